//! The launch of sgd.cu.

use super::{Rate, Rule, Update};
use crate::Result;
use crate::gpu::{Launch, Module, module};

const MODULE: Module = module!("sgd");

/// The number of parameters of a launch and of elements of a block, as the kernel is compiled. A
/// kernel's arguments have at most 4 KiB.
const PARAMETERS: usize = 64;
const PER_BLOCK: usize = 4096;

/// Applies all `updates`, whose gradients are contiguous, in as few launches as possible.
pub(super) fn step(updates: &[Update<'_>], rule: Rule<'_>) -> Result<()> {
    let (at, rate) = match rule.lr {
        Rate::Number(rate) => (None, rate),
        Rate::At(tensor) => (Some(tensor), 0.0),
    };
    for updates in updates.chunks(PARAMETERS) {
        let blocks = |update: &Update<'_>| update.param.elem_count().div_ceil(PER_BLOCK);
        let all = updates.iter().map(blocks).sum();
        let mut launch = Launch::new(MODULE, "step", [all, 1], [256, 1]);
        let mut first = 0;
        for update in updates {
            launch = launch
                .write(update.param)?
                .read(update.grad)?
                .write(update.velocity)?
                .sizes([update.param.elem_count(), first])?
                .floats([update.weight_decay as f32]);
            first += blocks(update);
        }
        for _ in updates.len()..PARAMETERS {
            launch = launch.read_if(None)?.read_if(None)?.read_if(None)?.sizes([0, 0, 0])?;
        }
        launch.read_if(at)?.sizes([updates.len()])?.floats([rate as f32, rule.momentum as f32]).run()?;
    }
    Ok(())
}
