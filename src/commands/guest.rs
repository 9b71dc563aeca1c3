//! `ringback guest`: a guest's process, started by `ringback run` with the domain's connection
//! as its standard input. It does the I/O that its plan says and reports on standard output, a
//! JSON document a line.

mod nbd;
mod net;

use std::io::{self, Write};
use std::os::fd::{AsFd, OwnedFd};
use std::process::ExitCode;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use blkback::config::GrantMode;
use blkback::{BlkFront, FrontOptions};
use blktap::{Disk, DiskQueue};
use hypervisor::Guest;
use hypervisor::embedded::{Frontend, Link};
use rustix::event::{PollFd, PollFlags, poll};

use super::Result;
use super::run::plan::VifReport;
use super::run::plan::{DiskPlan, DiskReport, Grants, GuestPlan, GuestReport, Line, Work};
use super::run::workload::{Part, Worker};

/// How often progress is told.
const TICK: Duration = Duration::from_millis(100);

/// Carries out a plan.
pub fn run(plan: &str) -> Result {
    let plan: GuestPlan = serde_json::from_str(plan)?;
    let link = Link::new(io::stdin().as_fd().try_clone_to_owned()?)?;
    let guest = Arc::new(Frontend::new(link));
    end_with(guest.lifeline()?)?;
    if let Some(socket) = &plan.nbd {
        return nbd::serve(&guest, &plan.disks, socket);
    }
    let progress = Arc::new(AtomicU64::new(0));
    let report = std::thread::scope(|scope| {
        let (guest, progress) = (&guest, &*progress);
        let disk = |disk| scope.spawn(move || run_disk(guest.clone(), disk, progress));
        let vif = |vif| scope.spawn(move || net::run(&**guest, vif, progress));
        let disks: Vec<_> = plan.disks.iter().map(disk).collect();
        let vifs: Vec<_> = plan.vifs.iter().map(vif).collect();
        while !disks.iter().all(std::thread::ScopedJoinHandle::is_finished)
            || !vifs.iter().all(std::thread::ScopedJoinHandle::is_finished)
        {
            say(&Line::Progress(progress.load(Ordering::Relaxed)))?;
            std::thread::sleep(TICK);
        }
        let disks = disks.into_iter().map(|t| t.join().unwrap_or_else(|_| Err(panicked())));
        let vifs = vifs.into_iter().map(|t| t.join().unwrap_or_else(|_| Err(panicked())));
        io::Result::Ok(GuestReport {
            disks: disks.collect::<io::Result<Vec<DiskReport>>>()?,
            vifs: vifs.collect::<io::Result<Vec<VifReport>>>()?,
        })
    })?;
    say(&Line::Report(report))?;
    Ok(ExitCode::SUCCESS)
}

fn panicked() -> io::Error {
    io::Error::other("a thread of the guest panicked")
}

fn say(line: &Line) -> io::Result<()> {
    let mut out = io::stdout().lock();
    serde_json::to_writer(&mut out, line)?;
    out.write_all(b"\n")?;
    out.flush()
}

/// Ends this process when the hypervisor is gone or has ended the domain.
fn end_with(lifeline: OwnedFd) -> io::Result<()> {
    let wait = move || loop {
        let mut fds = [PollFd::new(&lifeline, PollFlags::IN)];
        if poll(&mut fds, None).is_ok() && !fds[0].revents().is_empty() {
            errln!("ringback: guest: the hypervisor is gone, or has ended this domain");
            std::process::exit(1);
        }
    };
    std::thread::Builder::new().name("lifeline".into()).spawn(wait).map(drop)
}

fn connect(guest: Arc<dyn Guest>, plan: &DiskPlan) -> io::Result<BlkFront> {
    let options = FrontOptions {
        grants: match plan.grants {
            Grants::Persistent => GrantMode::Persistent,
            Grants::Copy => GrantMode::Copy,
        },
        max_queues: plan.queues,
        max_ring_page_order: plan.ring_page_order,
        ..FrontOptions::default()
    };
    BlkFront::connect(guest, plan.devid, options)
}

fn run_disk(guest: Arc<dyn Guest>, plan: &DiskPlan, done: &AtomicU64) -> io::Result<DiskReport> {
    let front = connect(guest, plan)?;
    let queues = front.queues();
    let parts = (0..queues)
        .map(|n| Ok((Part::of(plan, front.geometry(), n, queues), front.queue(plan.depth)?)))
        .collect::<io::Result<Vec<_>>>()?;
    let reports = std::thread::scope(|scope| {
        let start = |(number, (part, queue)): (usize, (Part, Box<dyn DiskQueue>))| {
            let cpu = plan.cpus.get(number % plan.cpus.len().max(1)).copied();
            scope.spawn(move || run_queue(part, queue, cpu, done))
        };
        let threads: Vec<_> = parts.into_iter().enumerate().map(start).collect();
        let ended = threads.into_iter().map(|t| t.join().unwrap_or_else(|_| Err(panicked())));
        ended.collect::<io::Result<Vec<Work>>>()
    })?;
    let chosen = front.chosen().clone();
    let mut report = DiskReport {
        vdev: plan.vdev.clone(),
        queues,
        ring_pages: chosen.queues.first().map_or(0, |q| q.ring_refs.len()),
        persistent: chosen.persistent,
        fault: front.fault(),
        ..DiskReport::default()
    };
    reports.into_iter().for_each(|work| report.add(work));
    if let Err(e) = front.close() {
        report.fault.get_or_insert(format!("closing: {e}"));
    }
    Ok(report)
}

fn run_queue(
    part: Part,
    queue: Box<dyn DiskQueue>,
    cpu: Option<u32>,
    done: &AtomicU64,
) -> io::Result<Work> {
    if let Some(cpu) = cpu {
        let mut set = rustix::thread::CpuSet::new();
        set.set(cpu as usize);
        rustix::thread::sched_setaffinity(None, &set)?;
    }
    Worker::new(part, queue, done).run()
}
