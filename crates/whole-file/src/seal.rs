//! Detection of changed data: hashes of files, and JSON objects that contain a hash of themselves.

use serde_json::Value;
use sha2::{Digest, Sha256};
use std::path::Path;
use std::{fs, io};

/// The member of a JSON object that holds the hash of all other members.
pub const SEAL: &str = "seal";

/// Returns the SHA-256 of some bytes, in lower-case hexadecimal digits.
pub fn sha256(data: impl AsRef<[u8]>) -> String {
    hex(&Sha256::digest(data))
}

/// Returns the SHA-256 of bytes that come in pieces.
pub fn sha256_of_pieces<'a>(pieces: impl IntoIterator<Item = &'a [u8]>) -> String {
    let mut hasher = Sha256::new();
    pieces.into_iter().for_each(|piece| hasher.update(piece));
    hex(&hasher.finalize())
}

/// Returns the SHA-256 of a file.
pub fn sha256_of_file(path: &Path) -> io::Result<String> {
    fs::read(path).map(sha256)
}

fn hex(hash: &[u8]) -> String {
    hash.iter().map(|byte| format!("{byte:02x}")).collect()
}

/// Computes the seal of a JSON object: the SHA-256 of the object without its seal.
///
/// The object is serialized without spaces and with sorted names, and a floating-point number (1.0,
/// but not 1) as the 16 hexadecimal digits of its bits. So the seal depends neither on the file's
/// layout nor on how floating-point numbers are written.
pub fn of(value: &Value) -> String {
    let mut rest = value.clone();
    if let Some(members) = rest.as_object_mut() {
        members.remove(SEAL);
    }
    rest.sort_all_objects();
    let mut text = String::new();
    write(&rest, &mut text);
    sha256(text)
}

fn write(value: &Value, text: &mut String) {
    match value {
        Value::Number(number) => match number.as_f64().filter(|_| number.is_f64()) {
            Some(float) => text.push_str(&format!("{:016x}", float.to_bits())),
            None => text.push_str(&number.to_string()),
        },
        Value::Array(items) => {
            text.push('[');
            for (place, item) in items.iter().enumerate() {
                text.push_str(if place > 0 { "," } else { "" });
                write(item, text);
            }
            text.push(']');
        }
        Value::Object(members) => {
            text.push('{');
            for (place, (name, member)) in members.iter().enumerate() {
                text.push_str(if place > 0 { "," } else { "" });
                write(&Value::from(name.as_str()), text);
                text.push(':');
                write(member, text);
            }
            text.push('}');
        }
        plain => text.push_str(&plain.to_string()),
    }
}

/// Checks the seal of a JSON object; returns whether it has one.
///
/// # Errors
/// A description of what was found and expected, if the seal does not match.
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

    /// The expected hash is that of
    /// `{"a":{"c":3ee4f8b588e368f1,"d":"ä"},"b":[3ff8000000000000,null]}`, computed by another
    /// program.
    #[test]
    fn a_seal_is_that_of_the_content() {
        let plain: Value =
            serde_json::from_str(r#"{ "b": [1.5, null], "a": {"d": "ä", "c": 1e-5} }"#).unwrap();
        let seal = "a2dd16cb88f2d235dc7ad556564ef55e9c012139988df6824359ad8a28e054d7";
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

    /// The expected hash is that of FIPS 180-2, appendix B.1.
    #[test]
    fn hashes_are_sha_256() {
        let expected = "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad";
        assert_eq!(sha256("abc"), expected);
        assert_eq!(sha256_of_pieces([&b"a"[..], b"", b"bc"]), expected);
    }
}
