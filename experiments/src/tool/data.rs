//! Test images for `pfq eval`.

use crate::progress::Display;
use anyhow::{Context as _, Result, bail};
use datasets::imagenet::{self, Limit, Options};
use datasets::{Data, Source};
use models::Network;
use std::sync::Arc;

/// Rows and columns of the smallest images that are ImageNet's rather than CIFAR-100's.
const LARGE: usize = 64;

/// The test images that `--data` asks for, of the data set that the network's input is laid out for.
pub(super) fn load(wanted: &str, limit: Option<usize>, network: &Network) -> Result<Box<dyn Data>> {
    let source: Source = wanted.parse().unwrap_or_else(|never| match never {});
    let mut display = Display::new();
    let [height, width, _] = network.input;
    let data: Box<dyn Data> = if height >= LARGE {
        let options = Options {
            side: height,
            resize: height * 8 / 7,
            test_limit: limit.map(Limit::Total),
            ..Options::default()
        };
        Box::new(imagenet::load(&source, &options, &mut |event| display.data(&event)).with_context(|| {
            format!(
                "the network's input of {height}×{width} pixels is ImageNet's (public weights trained on CIFAR-100's \
                 32×32: --strides cifar)"
            )
        })?)
    } else {
        let data = datasets::load(&source, &mut |event| display.data(&event))?;
        let limit = limit.filter(|&n| n < data.test.len());
        Box::new(Arc::new(data.limit(None, limit)?))
    };
    display.clear();
    if data.side() != (height, width) {
        let (rows, columns) = data.side();
        bail!(
            "the network is laid out for images of {height}×{width} pixels, {} has {rows}×{columns}",
            data.name()
        );
    }
    if network.classes() != data.classes() {
        bail!(
            "the network tells {} classes apart, {} has {}",
            network.classes(),
            data.name(),
            data.classes()
        );
    }
    Ok(data)
}
