//! `ringback knobs`: the tables of docs/tuning.md, from the code.

use std::process::ExitCode;

use hypervisor::xenbus::knobs::Knobs;

use super::Result;
use crate::cli;

/// The knobs of one kind of device.
fn show<C: Knobs>(kind: &str, options: &cli::Knobs) {
    if options.markdown {
        return out!("## {kind}\n\n{}\n", C::markdown());
    }
    outln!("{kind}:");
    for knob in C::KNOBS {
        outln!("  {:25} {} [default: {}; {}]", knob.name, knob.help, knob.default, knob.range);
    }
}

/// `ringback knobs`.
pub fn run(options: &cli::Knobs) -> Result {
    show::<blkback::Config>("Block devices", options);
    show::<netback::Config>("Network devices", options);
    Ok(ExitCode::SUCCESS)
}
