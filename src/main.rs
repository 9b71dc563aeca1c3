//! The program `ringback`: backends, the bundled hypervisor, and the commands for both.
// Its words go through `out`: a reader who has gone is no reason to panic.
#![deny(clippy::print_stderr)]

#[macro_use]
mod out;
mod cli;
mod commands;
mod platform;
mod signals;

use std::ffi::OsString;
use std::io::IsTerminal;
use std::path::Path;
use std::process::ExitCode;

use clap::Parser;

fn main() -> ExitCode {
    let cli = cli::Cli::parse_from(arguments(std::env::args_os()));
    log_to_stderr(cli.verbose);
    let done = commands::run(cli).unwrap_or_else(|e| {
        errln!("ringback: {e}");
        ExitCode::FAILURE
    });
    match out::finish() {
        Ok(()) => done,
        Err(e) => {
            errln!("ringback: standard output: {e}");
            ExitCode::FAILURE
        }
    }
}

/// Under some names (links) the program is another: management tools start a vhost-user back-end by
/// a path alone, and add options; storage managers call tap-ctl. Beside --print-capabilities no
/// other argument counts.
fn arguments(given: impl Iterator<Item = OsString>) -> Vec<OsString> {
    const BACK_END: [&str; 2] = ["export", "vhost-user-blk"];
    const CAPABILITIES: &str = "--print-capabilities";
    let mut all: Vec<OsString> = given.collect();
    let name = all.first().and_then(|path| Path::new(path).file_name());
    let words: &[&str] = match name.and_then(|name| name.to_str()) {
        Some("vhost-user-blk-ringback") => &BACK_END,
        Some("tap-ctl") => &["tap-ctl"],
        _ => &[],
    };
    let at = all.len().min(1);
    all.splice(at..at, words.iter().map(OsString::from));
    if all.iter().skip(1).take(2).eq(BACK_END.iter()) && all.iter().any(|a| a == CAPABILITIES) {
        all.truncate(3);
        all.push(CAPABILITIES.into());
    }
    all
}

fn log_to_stderr(verbose: u8) {
    let level = match verbose {
        0 => "info",
        1 => "debug",
        _ => "trace",
    };
    let filter = tracing_subscriber::EnvFilter::try_from_env("RINGBACK_LOG")
        .unwrap_or_else(|_| tracing_subscriber::EnvFilter::new(level));
    tracing_subscriber::fmt()
        .with_writer(std::io::stderr)
        .with_ansi(std::io::stderr().is_terminal())
        .with_env_filter(filter)
        .with_target(false)
        .init();
}
