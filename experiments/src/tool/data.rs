//! Test images for `pfq eval`.

use crate::progress::Display;
use anyhow::{Result, bail};
use datasets::{Dataset, Source};
use models::Network;
use std::sync::Arc;

/// The data set that `--data` asks for, if it fits the network. This is the one place where data sets are told
/// apart: folders of ImageNet's JPEGs belong here.
pub(super) fn load(wanted: &str, limit: Option<usize>, network: &Network) -> Result<Arc<Dataset>> {
    let source: Source = wanted.parse().unwrap_or_else(|never| match never {});
    let mut display = Display::new();
    let data = datasets::load(&source, &mut |event| display.data(&event))?;
    display.clear();
    let data = data.limit(None, limit.filter(|&n| n < data.test.len()))?;
    let [height, width, _] = network.input;
    if (data.test.height, data.test.width) != (height, width) {
        bail!(
            "the network is laid out for images of {height}×{width} pixels, {} has {}×{}{}",
            data.name,
            data.test.height,
            data.test.width,
            if height > data.test.height { " (public weights trained on it: --strides cifar)" } else { "" }
        );
    }
    if network.classes() != data.classes {
        bail!("the network tells {} classes apart, {} has {}", network.classes(), data.name, data.classes);
    }
    Ok(Arc::new(data))
}
