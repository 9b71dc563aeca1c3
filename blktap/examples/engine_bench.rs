//! 4 KiB random reads of a raw file through one queue: IOPS and CPU time and system calls per
//! request.
//!
//!     cargo run --release -p ringback-blktap --example engine_bench -- [--json] [FILE]
//!
//! Without FILE, a throw-away file of 256 MiB in the present folder.
#![allow(unsafe_code, clippy::print_stdout)]

use std::error::Error;
use std::io::Write;
use std::time::{Duration, Instant};

use blktap::storage::{Access, Cache, OpenOptions};
use blktap::{Disk, DiskQueue, IoBuf, NullDisk, Op, RawDisk, Request};

const BLOCK: usize = 4096;
const SIZE: usize = 256 << 20;
const TIME: Duration = Duration::from_secs(2);

struct Measured {
    disk: &'static str,
    depth: usize,
    iops: f64,
    cpu_us_per_request: f64,
    enters_per_request: f64,
}

/// CPU time of this thread so far, in microseconds.
fn cpu_us() -> f64 {
    let t = rustix::time::clock_gettime(rustix::time::ClockId::ThreadCPUTime);
    t.tv_sec as f64 * 1e6 + t.tv_nsec as f64 / 1e3
}

/// A cheap generator of offsets; the clock is read once in 1024 rounds.
fn measure(
    queue: &mut dyn DiskQueue,
    disk: &'static str,
    size: u64,
    depth: usize,
) -> Result<Measured, Box<dyn Error>> {
    let mut memory = vec![0u8; (depth + 1) * BLOCK];
    let skip = memory.as_ptr().align_offset(BLOCK);
    let base = memory[skip..].as_mut_ptr();
    // SAFETY: `depth` blocks inside `memory`, which stays until the queue has been drained.
    let bufs: Vec<_> =
        (0..depth).map(|n| [unsafe { IoBuf::new(base.add(n * BLOCK), BLOCK) }]).collect();
    let mut random = 0x2545_f491_4f6c_dd1du64;
    let mut send = |queue: &mut dyn DiskQueue, slot: u64| {
        random ^= random << 13;
        random ^= random >> 7;
        random ^= random << 17;
        let offset = random % (size / BLOCK as u64) * BLOCK as u64;
        let bufs = &bufs[slot as usize];
        queue.submit(&Request { op: Op::Read, offset, len: BLOCK as u64, bufs, token: slot })
    };
    let full = |_| "the queue is full";
    let enters = |queue: &dyn DiskQueue| queue.counters().map_or(0, |c| c.enters.get());
    let (before, start, cpu) = (enters(queue), Instant::now(), cpu_us());
    let mut done = Vec::with_capacity(depth);
    (0..depth as u64).try_for_each(|slot| send(queue, slot)).map_err(full)?;
    let (mut answered, mut round) = (0u64, 0u64);
    while round % 1024 != 0 || start.elapsed() < TIME {
        round += 1;
        queue.wait(&[], None)?;
        queue.poll(&mut done)?;
        for d in done.drain(..) {
            if d.errno != 0 {
                return Err(std::io::Error::from_raw_os_error(d.errno).into());
            }
            answered += 1;
            send(queue, d.token).map_err(full)?;
        }
    }
    let (time, calls, cpu) = (start.elapsed(), enters(queue) - before, cpu_us() - cpu);
    while queue.in_flight() > 0 {
        queue.wait(&[], None)?;
        queue.poll(&mut done)?;
    }
    let n = answered as f64;
    Ok(Measured {
        disk,
        depth,
        iops: n / time.as_secs_f64(),
        cpu_us_per_request: cpu / n,
        enters_per_request: calls as f64 / n,
    })
}

fn all(path: &std::path::Path) -> Result<Vec<Measured>, Box<dyn Error>> {
    let mut rows = Vec::new();
    for depth in [1, 32] {
        let null = NullDisk::new(SIZE as u64);
        rows.push(measure(&mut *null.queue(depth as u32)?, "null", SIZE as u64, depth)?);
        for (name, cache) in [("cached", Cache::Writeback), ("direct", Cache::None)] {
            let options = OpenOptions::new(path).access(Access::ReadOnly).cache(cache);
            let disk = RawDisk::open(&options)?;
            let size = disk.geometry().size;
            let mut queue = disk.queue(depth as u32)?;
            rows.push(measure(&mut *queue, name, size, depth)?);
        }
    }
    Ok(rows)
}

fn print(rows: &[Measured], json: bool) {
    if json {
        let rows: Vec<_> = rows
            .iter()
            .map(|m| {
                serde_json::json!({
                    "disk": m.disk,
                    "depth": m.depth,
                    "iops": m.iops.round(),
                    "cpu_us_per_request": m.cpu_us_per_request,
                    "enters_per_request": m.enters_per_request,
                })
            })
            .collect();
        let of = "4 KiB random reads, one queue";
        println!("{}", serde_json::json!({ "schema": 1, "of": of, "results": rows }));
        return;
    }
    let head = ["disk", "depth", "IOPS", "CPU us/request", "enters/request"];
    println!("{:8} {:>5} {:>12} {:>15} {:>15}", head[0], head[1], head[2], head[3], head[4]);
    for m in rows {
        let (iops, cpu, enters) = (m.iops, m.cpu_us_per_request, m.enters_per_request);
        println!("{:8} {:>5} {iops:>12.0} {cpu:>15.3} {enters:>15.3}", m.disk, m.depth);
    }
}

fn main() -> Result<(), Box<dyn Error>> {
    let (mut json, mut file) = (false, None);
    for argument in std::env::args().skip(1) {
        match argument.as_str() {
            "--json" => json = true,
            _ => file = Some(argument),
        }
    }
    let rows = match file {
        Some(path) => all(path.as_ref())?,
        None => {
            let mut made = tempfile::NamedTempFile::new_in(".")?;
            (0..SIZE / (1 << 20)).try_for_each(|n| made.write_all(&vec![n as u8; 1 << 20]))?;
            made.as_file().sync_all()?;
            all(made.path())?
        }
    };
    print(&rows, json);
    Ok(())
}
