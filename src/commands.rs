//! One file a command.

mod attach;
mod backend;
mod bench;
mod changed_log;
mod control;
mod daemon;
mod disk;
mod doctor;
mod export;
mod guest;
mod hypervisor;
mod knobs;
mod live;
mod run;
mod stats;
mod tap;

use std::process::ExitCode;

use crate::cli::disk::Disk;
use crate::cli::{Attach, Backend, Cli, Command, Detach, Export};
use crate::platform::{connect, run_dir};
use backend::Disks;
use netback::hold::Then;

/// Why a command failed; its text says what to do next.
pub type Result<T = ExitCode> = std::result::Result<T, Box<dyn std::error::Error>>;

/// What every command may need.
pub struct Context {
    /// `$RINGBACK_RUN`.
    pub run_dir: std::path::PathBuf,
    /// The bundled hypervisor's socket, if it is to be used.
    pub socket: Option<std::path::PathBuf>,
}

impl Context {
    fn hypervisor(&self) -> std::io::Result<std::sync::Arc<dyn ::hypervisor::Hypervisor>> {
        connect(self.socket.as_deref())
    }
}

/// Carries out the command.
pub fn run(cli: Cli) -> Result {
    if let Some(parent) = cli.end_with {
        end_with(parent)?;
    }
    let command = match cli.command.unwrap_or_else(|| Command::Run(Default::default())) {
        // These have a run folder of their own, or none.
        Command::Run(_) if cli.hypervisor.is_some() => {
            return Err("run starts a hypervisor of its own; leave --hypervisor out".into());
        }
        Command::Run(options) => return run::run(&options),
        Command::Guest { plan } => return guest::run(&plan),
        Command::Bench(bench) => return bench::run(&bench),
        Command::Disk(disk) if !disk.is_served() => return disk::run(cli.run_dir, &disk),
        Command::Export(Export::Nbd(options)) => return export::nbd(&options),
        Command::Export(Export::VhostUserBlk(options)) => return export::vhost_user_blk(&options),
        command => command,
    };
    let context = Context { run_dir: run_dir(cli.run_dir)?, socket: cli.hypervisor };
    match command {
        Command::Run(_) | Command::Guest { .. } | Command::Bench(_) | Command::Export(_) => {
            Ok(ExitCode::SUCCESS)
        }
        Command::Hypervisor(options) => hypervisor::run(&context, &options),
        Command::Daemon(options) => daemon::run(&context, &options),
        Command::Backend(Backend::Blk { domid, null_disks, serve }) => {
            let disks = if null_disks { Disks::WithNull } else { Disks::Real };
            backend::blk(&context, domid, disks, &serve)
        }
        Command::Backend(Backend::Net { domid, serve }) => backend::net(&context, domid, &serve),
        Command::Attach(Attach::Blk { domid, vdev, target, read_only, drive, set, backend }) => {
            let disk = attach::Disk { domid, vdev, target, read_only, drive, set, backend };
            attach::attach(&context, &disk)
        }
        Command::Detach(Detach::Blk { domid, vdev, force, backend }) => {
            attach::detach(&context, domid, &vdev, force, backend)
        }
        Command::Resize(device) => live::resize(&context, &device.device),
        Command::Set { device, knob, value } => live::set(&context, &device, &knob, &value),
        Command::Output { device, action, and_hold } => {
            let then = if and_hold { Then::Hold } else { Then::Pass };
            live::output(&context, &device, action, then)
        }
        Command::ChangedLog(command) => changed_log::run(&context, &command),
        Command::Cd(cd) => attach::cd(&context, &cd),
        Command::Disk(Disk::Connect(options)) => tap::connect(&context, &options),
        Command::Disk(Disk::Disconnect(options)) => tap::disconnect(&context, &options),
        Command::Disk(_) => Ok(ExitCode::SUCCESS),
        Command::TapCtl(tap) => tap::run(&context, &tap),
        Command::Stats(options) => stats::stats(&context, &options),
        Command::List(options) => stats::list(&context, &options),
        Command::Doctor(options) => doctor::run(&context, &options),
        Command::Knobs(options) => knobs::run(&options),
        Command::Version => {
            outln!("ringback {}", env!("CARGO_PKG_VERSION"));
            Ok(ExitCode::SUCCESS)
        }
    }
}

/// Has the kernel end this process with its parent.
fn end_with(parent: i32) -> std::io::Result<()> {
    use rustix::process::{Pid, Signal, getppid, set_parent_process_death_signal};
    set_parent_process_death_signal(Some(Signal::KILL))?;
    // It may have ended before.
    match getppid().map(Pid::as_raw_pid) {
        Some(pid) if pid == parent => Ok(()),
        _ => Err(std::io::Error::other("the parent process has ended")),
    }
}
