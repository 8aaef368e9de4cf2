//! The published figures, compiled in from `paper/*.csv`.

use std::collections::BTreeMap;
use std::sync::LazyLock;

use serde::Deserialize;
use serde::de::DeserializeOwned;

/// One line of a table of the paper.
#[derive(Deserialize, Clone, Debug, PartialEq)]
pub struct PaperRow {
    /// The network.
    pub model: String,
    /// The data set.
    pub dataset: String,
    /// The bit width of the activations.
    pub activation_bits: u32,
    /// The bit width of the weights; 32 is float.
    pub weight_bits: u32,
    /// The method's name.
    pub method: String,
    /// Top-1 accuracy in percent.
    pub top1_percent: f64,
    /// Millions of multiply-accumulates, with the decimals that the paper prints.
    pub mac_millions: f64,
}

/// The share of weights that the paper's pruning removes from a network.
#[derive(Deserialize, Clone, Debug, PartialEq)]
pub struct PaperPruned {
    /// The network.
    pub model: String,
    /// The data set.
    pub dataset: String,
    /// The percentage of the weights that are removed.
    pub weights_pruned_percent: f64,
    /// The place in the paper that says so.
    #[serde(rename = "where")]
    pub source: String,
}

/// The tables of Nishikawa and Ikegaya, arXiv:2011.06751.
#[derive(Clone, Debug)]
pub struct Paper {
    tables: BTreeMap<&'static str, Vec<PaperRow>>,
    pruned: Vec<PaperPruned>,
}

/// The name and the text of every table.
const TABLES: [(&str, &str); 5] = [
    ("table1", include_str!("../paper/table1.csv")),
    ("table2", include_str!("../paper/table2.csv")),
    ("table3", include_str!("../paper/table3.csv")),
    ("table4", include_str!("../paper/table4.csv")),
    ("table5", include_str!("../paper/table5.csv")),
];

static PUBLISHED: LazyLock<Paper> = LazyLock::new(|| Paper {
    tables: TABLES.map(|(name, text)| (name, parse(text))).into(),
    pruned: parse(include_str!("../paper/pruned_weights.csv")),
});

fn parse<T: DeserializeOwned>(text: &str) -> Vec<T> {
    let rows = csv::Reader::from_reader(text.as_bytes()).into_deserialize().collect::<Result<_, _>>();
    rows.expect("the files compiled in are read by the tests")
}

impl Paper {
    /// Returns the published figures.
    pub fn published() -> &'static Paper {
        &PUBLISHED
    }

    /// Returns the names of the paper's tables: "table1" and so on.
    pub fn tables(&self) -> impl Iterator<Item = &'static str> {
        self.tables.keys().copied()
    }

    /// Returns the rows of a table, in the paper's order; empty if there is no such table.
    pub fn table(&self, name: &str) -> &[PaperRow] {
        self.tables.get(name).map_or(&[], Vec::as_slice)
    }

    /// Returns the networks of all tables, each once.
    pub fn models(&self) -> Vec<&str> {
        distinct(self.tables.values().flatten().map(|row| row.model.as_str()))
    }

    /// Returns the methods of a table, each once, in the paper's order: the proposed one is last.
    pub fn methods(&self, table: &str) -> Vec<&str> {
        distinct(self.table(table).iter().map(|row| row.method.as_str()))
    }

    /// Returns the row of the table `table` with these bits and this method.
    ///
    /// Each table has its own data set, so the data set need not be given. The table must be given,
    /// because Tables 3 and 5 differ for the same setting.
    pub fn lookup(
        &self,
        table: &str,
        model: &str,
        activation_bits: u32,
        weight_bits: u32,
        method: &str,
    ) -> Option<&PaperRow> {
        let wanted = (model, activation_bits, weight_bits, method);
        let key = |row: &PaperRow| wanted == (&row.model, row.activation_bits, row.weight_bits, &row.method);
        self.table(table).iter().find(|row| key(row))
    }

    /// Returns the data set of the table `table`.
    pub fn dataset(&self, table: &str) -> Option<&str> {
        self.table(table).first().map(|row| row.dataset.as_str())
    }

    /// Returns the shares of weights that the paper's pruning removes.
    pub fn pruned_weights(&self) -> &[PaperPruned] {
        &self.pruned
    }
}

/// Returns the distinct values, in the order of their first occurrence.
pub(crate) fn distinct<T: PartialEq>(values: impl IntoIterator<Item = T>) -> Vec<T> {
    let mut found = Vec::new();
    for value in values {
        if !found.contains(&value) {
            found.push(value);
        }
    }
    found
}
