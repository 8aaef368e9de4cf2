//! What the table binaries share.
