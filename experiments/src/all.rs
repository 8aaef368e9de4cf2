//! The binary for every table of the paper and Figure 3.

use crate::session::{self, Done};
use crate::{figure3, pretrained, table, tables};
use anyhow::Result;

/// Runs the binary: every table and Figure 3, which share stages.
pub fn main() -> Result<()> {
    let flags = table::parse(&tables::ALL);
    let only = table::only(&tables::ALL, &flags)?;
    session::main(&flags, false, |session| {
        let done = table::run(&tables::ALL, &only, session, &flags)?;
        // `--only` picks rows of tables. A plan of all tables has the figure's stages too.
        if done == Done::InTime
            || flags.plan
            || flags.publish
            || flags.draw
            || flags.stage.is_some()
            || !flags.only.is_empty()
        {
            return Ok(done);
        }
        figure3::run(&pretrained::models(&flags)?, session, &flags)
    })
}
