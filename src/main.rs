//! The program `ringback`: backends, the bundled hypervisor, and the commands for both.
// A command line program prints.
#![allow(clippy::print_stdout)]

mod cli;
mod commands;
mod platform;
mod signals;

use std::io::IsTerminal;
use std::path::Path;
use std::process::ExitCode;

use clap::Parser;

fn main() -> ExitCode {
    let cli = cli::Cli::parse_from(arguments());
    log_to_stderr(cli.verbose);
    match commands::run(cli) {
        Ok(code) => code,
        Err(e) => {
            eprintln!("ringback: {e}");
            ExitCode::FAILURE
        }
    }
}

/// The command line; called by the name tap-ctl, the program is that.
fn arguments() -> Vec<std::ffi::OsString> {
    let mut all: Vec<_> = std::env::args_os().collect();
    let name = all.first().and_then(|name| Path::new(name).file_name());
    if name.is_some_and(|name| name == "tap-ctl") {
        all.insert(1, "tap-ctl".into());
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
