//! Whether what is read is what was written: hashes of files, and JSON that holds a hash of itself.

use serde_json::Value;
use sha2::{Digest, Sha256};

/// The member of a JSON object that holds the hash of the rest.
pub const SEAL: &str = "seal";

/// The SHA-256 of some bytes, in lower-case hexadecimal digits.
pub fn sha256(data: impl AsRef<[u8]>) -> String {
    hex(&Sha256::digest(data))
}

/// The SHA-256 of bytes that come in pieces.
pub fn sha256_of_pieces<'a>(pieces: impl IntoIterator<Item = &'a [u8]>) -> String {
    let mut hasher = Sha256::new();
    pieces.into_iter().for_each(|piece| hasher.update(piece));
    hex(&hasher.finalize())
}

fn hex(hash: &[u8]) -> String {
    hash.iter().map(|byte| format!("{byte:02x}")).collect()
}

/// What the seal of a JSON object has to be: the SHA-256 of the object without its seal, written without spaces and with
/// names in order. So it does not depend on how the file is laid out.
pub fn of(value: &Value) -> String {
    let mut rest = value.clone();
    if let Some(members) = rest.as_object_mut() {
        members.remove(SEAL);
    }
    rest.sort_all_objects();
    sha256(rest.to_string())
}

/// Checks the seal of a JSON object; gives whether it has one.
///
/// # Errors
/// What was found and what was expected, where the seal is another.
pub fn check(value: &Value) -> Result<bool, String> {
    let Some(found) = value.get(SEAL) else { return Ok(false) };
    let expected = of(value);
    match found.as_str() == Some(&expected) {
        true => Ok(true),
        false => Err(format!("its seal is {found}, expected \"{expected}\"")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    /// The hash was found by a program that knows JSON and SHA-256 only.
    #[test]
    fn a_seal_is_that_of_the_content() {
        let plain: Value =
            serde_json::from_str(r#"{ "b": [1.5, null], "a": {"d": "ä", "c": 1e-5} }"#).unwrap();
        let seal = "3e2ff51f34a115e10e3d972ddc82bfa8cb967ba9e0b136030aff14b86049831c";
        assert_eq!(of(&plain), seal);
        let mut sealed = plain.clone();
        sealed[SEAL] = seal.into();
        assert_eq!((check(&plain), check(&sealed)), (Ok(false), Ok(true)));
        let again: Value = serde_json::from_str(&serde_json::to_string_pretty(&sealed).unwrap()).unwrap();
        assert_eq!(check(&again), Ok(true));
        sealed["a"]["c"] = json!(1.1e-5);
        assert!(check(&sealed).unwrap_err().contains("expected"));
        assert!(check(&json!({ "seal": 1 })).is_err());
    }

    /// FIPS 180-2, appendix B.1.
    #[test]
    fn hashes_are_sha_256() {
        let expected = "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad";
        assert_eq!(sha256("abc"), expected);
        assert_eq!(sha256_of_pieces([&b"a"[..], b"", b"bc"]), expected);
    }
}
