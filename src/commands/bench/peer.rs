//! The client of a vhost-user-blk export: the `blkio` crate's driver, under the same load as our
//! frontend.

use std::io;
use std::path::PathBuf;

use serde::{Deserialize, Serialize};

use super::load::{Load, Measured};

/// How a client waits for answers.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Waiting {
    /// It looks at the ring all the time (blkio's poll queue).
    Polling,
    /// It sleeps until an event.
    Sleeping,
}

/// What the client's process is told.
#[derive(Debug, Serialize, Deserialize)]
pub struct Plan {
    pub socket: PathBuf,
    pub read_only: bool,
    pub load: Load,
    pub waiting: Waiting,
    pub backend_pid: u32,
}

/// Whether this program has a client.
pub const BUILT: bool = cfg!(feature = "bench-peers");

/// Carries out a plan.
#[cfg(not(feature = "bench-peers"))]
pub fn run(_: &Plan) -> io::Result<Measured> {
    Err(io::Error::other("built without the feature bench-peers"))
}

#[cfg(feature = "bench-peers")]
pub use client::run;

#[cfg(feature = "bench-peers")]
mod client {
    use std::mem::MaybeUninit;

    use blkio::{Blkio, Blkioq, Completion, MemoryRegion, ReqFlags};

    use super::{Load, Measured, Plan, Waiting, io};
    use crate::commands::bench::load::{self, BLOCK, Client, Op};
    use crate::commands::bench::usage;

    /// Slots of the virtqueue; a request takes three.
    const QUEUE_SIZE: i32 = 256;

    struct Peer {
        queue: Blkioq,
        base: *mut u8,
        completions: Vec<MaybeUninit<Completion>>,
    }

    fn failed(e: blkio::Error) -> io::Error {
        io::Error::other(e.to_string())
    }

    impl Client for Peer {
        fn send(&mut self, op: Op, offset: u64, slot: u32) -> io::Result<()> {
            let len = BLOCK as usize;
            let buf = self.base.wrapping_add(slot as usize * len);
            match op {
                Op::Read => self.queue.read(offset, buf, len, slot as usize, ReqFlags::empty()),
                Op::Write => self.queue.write(offset, buf, len, slot as usize, ReqFlags::empty()),
            }
            Ok(())
        }

        fn collect(&mut self, answered: &mut Vec<u32>) -> io::Result<()> {
            let count = loop {
                match self.queue.do_io(&mut self.completions, 1, None, None) {
                    Ok(count) => break count,
                    // Its eventfd was read before there was anything.
                    Err(e) if e.errno() == blkio::Errno::AGAIN => {}
                    Err(e) => return Err(failed(e)),
                }
            };
            for completion in &self.completions[..count] {
                let (slot, ret) = read(completion);
                if ret != 0 {
                    return Err(io::Error::from_raw_os_error(-ret));
                }
                answered.push(slot as u32);
            }
            Ok(())
        }

        fn calls(&self) -> Option<u64> {
            None
        }
    }

    #[allow(unsafe_code)]
    fn read(completion: &MaybeUninit<Completion>) -> (usize, i32) {
        // SAFETY: do_io has written as many as it said.
        let completion = unsafe { completion.assume_init_ref() };
        (completion.user_data, completion.ret)
    }

    fn connect(plan: &Plan) -> Result<(Blkio, Blkioq, MemoryRegion), blkio::Error> {
        let mut disk = Blkio::new("virtio-blk-vhost-user")?;
        disk.set_str("path", &plan.socket.display().to_string())?;
        disk.set_bool("read-only", plan.read_only)?;
        disk.connect()?;
        let polling = plan.waiting == Waiting::Polling;
        disk.set_i32("num-queues", i32::from(!polling))?;
        disk.set_i32("num-poll-queues", i32::from(polling))?;
        disk.set_i32("queue-size", QUEUE_SIZE)?;
        let mut started = disk.start()?;
        let bytes = plan.load.depth as usize * BLOCK as usize;
        let align = disk.get_u64("mem-region-alignment")? as usize;
        let region = disk.alloc_mem_region(bytes.next_multiple_of(align))?;
        disk.map_mem_region(&region)?;
        let queues = if polling { &mut started.poll_queues } else { &mut started.queues };
        let queue = queues.pop().ok_or(blkio::Errno::NODEV)?;
        Ok((disk, queue, region))
    }

    /// Carries out a plan.
    pub fn run(plan: &Plan) -> io::Result<Measured> {
        let (disk, queue, region) = connect(plan).map_err(failed)?;
        let load: Load = plan.load;
        let completions = (0..load.depth).map(|_| MaybeUninit::uninit()).collect();
        let mut client = Peer { queue, base: region.addr as *mut u8, completions };
        let pid = plan.backend_pid.to_string();
        let measured = load::drive(&mut client, load, &|| Ok((usage::of(&pid)?, None)));
        drop(client);
        drop(disk);
        measured
    }
}
