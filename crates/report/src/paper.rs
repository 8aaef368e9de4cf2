//! The published figures, compiled in from `paper/*.csv`.

use std::sync::LazyLock;

use serde::Deserialize;
use serde::de::DeserializeOwned;

/// One line of a table of the paper.
#[derive(Deserialize, Clone, Debug, PartialEq)]
pub struct PaperRow {
    /// The network.
    pub model: String,
    /// The data.
    pub dataset: String,
    /// Bits of the activations.
    pub activation_bits: u32,
    /// Bits of the weights; 32 is float.
    pub weight_bits: u32,
    /// The method, by its name in [`METHODS`](crate::METHODS).
    pub method: String,
    /// Top-1 accuracy in percent.
    pub top1_percent: f64,
    /// Millions of multiply-accumulates, with the decimals that the paper prints.
    pub mac_millions: f64,
}

/// The share of weights that the paper's pruning removes.
#[derive(Deserialize, Clone, Debug, PartialEq)]
pub struct PaperPruned {
    /// The network.
    pub model: String,
    /// The data.
    pub dataset: String,
    /// Percent of the weights removed.
    pub weights_pruned_percent: f64,
    /// Where the paper says so.
    #[serde(rename = "where")]
    pub source: String,
}

/// Tables 1 to 5 of Nishikawa and Ikegaya, arXiv:2011.06751.
#[derive(Clone, Debug)]
pub struct Paper {
    tables: [Vec<PaperRow>; 5],
    pruned: Vec<PaperPruned>,
}

static PUBLISHED: LazyLock<Paper> = LazyLock::new(|| Paper {
    tables: [
        parse(include_str!("../paper/table1.csv")),
        parse(include_str!("../paper/table2.csv")),
        parse(include_str!("../paper/table3.csv")),
        parse(include_str!("../paper/table4.csv")),
        parse(include_str!("../paper/table5.csv")),
    ],
    pruned: parse(include_str!("../paper/pruned_weights.csv")),
});

fn parse<T: DeserializeOwned>(text: &str) -> Vec<T> {
    let rows = csv::Reader::from_reader(text.as_bytes()).into_deserialize().collect::<Result<_, _>>();
    rows.expect("the files compiled in are read by the tests")
}

impl Paper {
    /// The published figures.
    pub fn published() -> &'static Paper {
        &PUBLISHED
    }

    /// The rows of Table `number`, in the paper's order; none where the paper has no such table of results.
    pub fn table(&self, number: usize) -> &[PaperRow] {
        number.checked_sub(1).and_then(|index| self.tables.get(index)).map_or(&[], Vec::as_slice)
    }

    /// The rows of a table by its name in the CSV files, as "table3".
    pub fn table_named(&self, name: &str) -> &[PaperRow] {
        name.strip_prefix("table")
            .and_then(|number| number.parse().ok())
            .map_or(&[], |number| self.table(number))
    }

    /// The row of the table called `table` with these bits and this method. Each table has its own data, so
    /// the data need not be named; the table must be, as Tables 3 and 5 differ on the same setting.
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
        self.table_named(table).iter().find(|row| key(row))
    }

    /// The data of the table called `table`.
    pub fn dataset(&self, table: &str) -> Option<&str> {
        self.table_named(table).first().map(|row| row.dataset.as_str())
    }

    /// The shares of weights that the paper's pruning removes.
    pub fn pruned_weights(&self) -> &[PaperPruned] {
        &self.pruned
    }
}
