//! Generates the list of the paper's tables, so that a table is added by its CSV file alone.

use std::path::{Path, PathBuf};
use std::{env, fs};

fn main() {
    println!("cargo::rerun-if-changed=paper");
    let folder = Path::new(&env::var("CARGO_MANIFEST_DIR").unwrap()).join("paper");
    let files = fs::read_dir(folder).unwrap().map(|entry| entry.unwrap().path());
    let stem = |path: &PathBuf| path.file_stem().unwrap().to_str().unwrap().to_string();
    let mut tables: Vec<PathBuf> =
        files.filter(|path| path.extension().is_some_and(|e| e == "csv")).collect();
    tables.retain(|path| stem(path) != "pruned_weights");
    tables.sort();
    // The folder is resolved when the crate is compiled, because a checkout can be moved together
    // with its build outputs.
    let entry = |path: &PathBuf| {
        let name = stem(path);
        format!("({name:?}, include_str!(concat!(env!(\"CARGO_MANIFEST_DIR\"), \"/paper/{name}.csv\"))), ")
    };
    let entries = tables.iter().map(entry);
    let list = Path::new(&env::var("OUT_DIR").unwrap()).join("tables.rs");
    fs::write(list, format!("[{}]", entries.collect::<String>())).unwrap();
}
