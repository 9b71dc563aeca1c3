//! `ringback bench net`: packets from a guest's process to a network backend's loopback and back, by
//! pages of the rings, with the guest's pages kept mapped (static grants) and without.

pub mod guest;

use std::process::ExitCode;

use serde::Serialize;

use super::host::{self, End, Machine};
use super::{Result, Scratch, machine, median};
use crate::cli::{BenchNet, BenchPacket, BenchPages, Placement};
use crate::commands::disk::work::Work;
use guest::{Measured, Packet, Plan, Staging};

/// Seconds before each measurement.
const WARM_UP: f64 = 0.1;
const DEVID: u32 = 0;
/// All pages that the longest rings name can be kept.
const OPTIONS: &str = "max_queues=1,staging_grants=8192";

impl BenchPages {
    const ALL: [BenchPages; 3] = [BenchPages::Order0, BenchPages::Order2, BenchPages::Order4];

    fn order(self) -> u32 {
        match self {
            BenchPages::Order0 => 0,
            BenchPages::Order2 => 2,
            BenchPages::Order4 => 4,
        }
    }
}

impl BenchPacket {
    const ALL: [BenchPacket; 3] = [BenchPacket::Small, BenchPacket::Full, BenchPacket::Gso];

    fn packet(self) -> Packet {
        match self {
            BenchPacket::Small => Packet::Plain(64),
            BenchPacket::Full => Packet::Plain(1500),
            BenchPacket::Gso => Packet::Gso,
        }
    }
}

/// A line of the table: medians.
#[derive(Clone, Debug, Serialize)]
struct Row {
    bytes: usize,
    gso: bool,
    ring_pages: u32,
    staging: Staging,
    /// Packets that went and came back, and their bits each way.
    packets_per_s: f64,
    gbit_per_s: f64,
    /// Microseconds of processor time a packet, by process.
    guest_cpu_us: f64,
    backend_cpu_us: f64,
    hypervisor_cpu_us: f64,
    /// System calls on the data path a packet.
    guest_calls: f64,
    backend_calls: f64,
}

impl Row {
    fn of(all: &[Measured], packet: Packet, order: u32, staging: Staging) -> Row {
        let by = |f: &dyn Fn(&Measured) -> f64| median(all.iter().map(f).collect());
        let a_packet = |n: u64, m: &Measured| n as f64 / (m.packets as f64).max(1.0);
        let packets_per_s = by(&|m| m.packets as f64 / m.seconds);
        Row {
            bytes: packet.len(),
            gso: packet == Packet::Gso,
            ring_pages: 1 << order,
            staging,
            packets_per_s,
            gbit_per_s: packets_per_s * packet.len() as f64 * 8.0 / 1e9,
            guest_cpu_us: by(&|m| a_packet(m.guest.cpu_ns, m) / 1e3),
            backend_cpu_us: by(&|m| a_packet(m.backend.cpu_ns, m) / 1e3),
            hypervisor_cpu_us: by(&|m| a_packet(m.hypervisor.cpu_ns, m) / 1e3),
            guest_calls: by(&|m| a_packet(m.guest_calls, m)),
            backend_calls: by(&|m| a_packet(m.backend_calls, m)),
        }
    }
}

/// All, where none is named.
fn chosen<T: Copy>(named: &[T], all: &[T]) -> Vec<T> {
    if named.is_empty() { all.to_vec() } else { named.to_vec() }
}

/// Runs all rows.
pub fn run(options: &BenchNet) -> Result {
    if !(options.seconds > 0.0 && options.seconds <= 3600.0) {
        return Err("--seconds: more than 0 and at most 3600".into());
    }
    let pages = chosen(&options.pages, &BenchPages::ALL);
    let packets = chosen(&options.size, &BenchPacket::ALL);
    let pairs = packets.iter().flat_map(|packet| pages.iter().map(|pages| (*packet, *pages)));
    let pairs: Vec<_> = pairs.collect();
    let rounds = options.rounds.max(1);
    let mut bench = Bench {
        machine: start(options)?,
        seconds: options.seconds,
        rounds,
        work: Work::new(options.progress)?,
        done: 0,
        total: u64::from(rounds) * 2 * pairs.len() as u64,
    };
    if !options.json {
        heading(options);
    }
    let mut rows = Vec::new();
    for (packet, pages) in pairs {
        let two = bench.rows(packet.packet(), pages.order())?;
        if !options.json {
            bench.work.clear();
            two.iter().for_each(print);
        }
        rows.extend(two);
    }
    bench.work.end();
    if options.json {
        let document = serde_json::json!({
            "schema": 1, "bench": "net", "machine": machine(),
            "pinned": options.place == Placement::Pinned, "seconds": options.seconds,
            "rounds": rounds, "rows": rows,
        });
        outln!("{document}");
    }
    Ok(ExitCode::SUCCESS)
}

/// A backend with a loopback for the guest.
fn start(options: &BenchNet) -> Result<(Machine, Scratch)> {
    let folder = Scratch::new(None)?;
    host::place(options.place, End::Backend)?;
    let machine = Machine::start(folder.path(), &["net"])?;
    // The guests that will be started.
    host::place(options.place, End::Guest)?;
    let knobs = std::iter::once(OPTIONS).chain(options.set.iter().map(String::as_str));
    let knobs = knobs.collect::<Vec<_>>().join(",");
    let keys = [
        ("type", "loopback"),
        ("mtu", "65535"),
        ("script", netback::SCRIPT),
        ("hotplug-status", "connected"),
        ("options", &knobs),
    ];
    machine.attach("vif", DEVID, (&keys, &[("mac", "52:42:00:00:00:02")]))?;
    Ok((machine, folder))
}

struct Bench {
    /// The processes end before their folder goes.
    machine: (Machine, Scratch),
    seconds: f64,
    rounds: u32,
    work: Work,
    /// Measurements made, and to be made.
    done: u64,
    total: u64,
}

impl Bench {
    /// Without kept pages and with them, in turn; who is first changes with each round.
    fn rows(&mut self, packet: Packet, order: u32) -> Result<[Row; 2]> {
        let ways = [Staging::Off, Staging::On];
        let mut measured = [Vec::new(), Vec::new()];
        for round in 0..self.rounds {
            for turn in 0..2 {
                let way = (turn + round as usize) % 2;
                self.work.go_on(self.done, self.total)?;
                measured[way].push(self.measure(packet, order, ways[way])?);
                self.done += 1;
            }
        }
        let row = |way: usize| Row::of(&measured[way], packet, order, ways[way]);
        Ok([row(0), row(1)])
    }

    fn measure(&self, packet: Packet, order: u32, staging: Staging) -> Result<Measured> {
        let machine = &self.machine.0;
        let plan = Plan {
            devid: DEVID,
            packet,
            ring_page_order: order,
            staging,
            warm_up: WARM_UP,
            seconds: self.seconds,
            backend_pid: machine.backend.child.id(),
            hypervisor_pid: machine.hypervisor.child.id(),
            stats: machine.stats("vif", DEVID),
        };
        Ok(machine.measure("net-guest", &plan)?)
    }
}

fn heading(options: &BenchNet) {
    outln!(
        "packets to a loopback and back, one queue, 128 under way; medians of {} rounds of {} s",
        options.rounds.max(1),
        options.seconds
    );
    outln!("(CPU in us and system calls of the data path a packet, there and back)");
    outln!(
        "{:>6} {:>5} {:>7} {:>10} {:>7} {:>9} {:>8} {:>10} {:>11} {:>8}",
        "bytes",
        "pages",
        "staging",
        "packets/s",
        "Gbit/s",
        "CPU guest",
        "backend",
        "hypervisor",
        "calls guest",
        "backend"
    );
}

fn print(row: &Row) {
    let staging = match row.staging {
        Staging::On => "on",
        Staging::Off => "off",
    };
    outln!(
        "{:6} {:5} {staging:>7} {:10.0} {:7.2} {:9.2} {:8.2} {:10.2} {:11.3} {:8.3}",
        row.bytes,
        row.ring_pages,
        row.packets_per_s,
        row.gbit_per_s,
        row.guest_cpu_us,
        row.backend_cpu_us,
        row.hypervisor_cpu_us,
        row.guest_calls,
        row.backend_calls
    );
}
