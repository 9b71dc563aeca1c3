//! `ringback knobs`: the table of docs/tuning.md, from the code.

use std::process::ExitCode;

use blkback::config::KNOBS;

use super::Result;
use crate::cli::Knobs;

/// `ringback knobs`.
pub fn run(options: &Knobs) -> Result {
    if options.markdown {
        print!("{}", blkback::config::markdown());
        return Ok(ExitCode::SUCCESS);
    }
    for knob in KNOBS {
        println!("{:22} {} [default: {}; {}]", knob.name, knob.help, knob.default, knob.range);
    }
    Ok(ExitCode::SUCCESS)
}
