//! From the ring to the caller.

use blktap::{Done, Op};
use rustix::io::Errno;

use super::super::pages::{Chain, Way};
use super::{Call, Payload, Queue};
use crate::proto::{self, Abi, RSP_EOPNOTSUPP, RSP_OKAY};
use hypervisor::xenbus::front::Stage;

fn io_error() -> i32 {
    Errno::IO.raw_os_error()
}

impl<A: Abi> Queue<A> {
    /// Takes all answers that are there; whether there was any.
    pub(super) fn reap(&mut self) -> bool {
        let mut any = false;
        if self.shared.health.stage() == Stage::Broken {
            return self.give_up();
        }
        loop {
            match self.ring.take() {
                Ok(Some(raw)) => {
                    any = true;
                    if let Err(why) = self.answered(&A::parse_response(&raw)) {
                        self.shared.health.fail(format!("{}: {why}", self.name));
                        return self.give_up();
                    }
                }
                Ok(None) => break,
                Err(e) => {
                    self.shared.health.fail(format!("{}: {e}", self.name));
                    return self.give_up();
                }
            }
        }
        if any {
            self.advance();
        }
        any
    }

    pub(super) fn answered(&mut self, rsp: &proto::Response) -> Result<(), String> {
        let number = (rsp.id & u64::from(u32::MAX)) as usize;
        let known = self.calls.get(number).filter(|c| c.used && c.id == rsp.id);
        let Some(call) = known.copied() else {
            return Err(format!("the backend answered a request {:#x} that is not open", rsp.id));
        };
        if rsp.operation != call.operation {
            return Err(format!(
                "the backend answered operation {} with operation {}",
                call.operation, rsp.operation
            ));
        }
        let errno = match rsp.status {
            RSP_OKAY => 0,
            RSP_EOPNOTSUPP => Errno::OPNOTSUPP.raw_os_error(),
            _ => io_error(),
        };
        let job = &mut self.jobs[call.job as usize];
        if errno == 0 && job.op == Op::Read && job.payload == Payload::Copied {
            let (skip, len) = (call.skip as usize, call.len as usize);
            self.pages.copy(call.chain, &job.bufs, skip, len, Way::Out);
        }
        if errno != 0 {
            self.counters.errors.add(1);
            job.errno = errno;
        }
        job.calls -= 1;
        self.pages.give(call.chain);
        // A second answer to this one does not pass for an answer to the slot's next request.
        let next = call.id.wrapping_add(1 << 32);
        self.calls[number] = Call { id: next, used: false, chain: Chain::EMPTY, ..call };
        self.free_calls.push(number as u32);
        self.settle(call.job);
        Ok(())
    }

    /// Ends a job when all of it is answered.
    pub(super) fn settle(&mut self, number: u32) {
        let job = &mut self.jobs[number as usize];
        if job.calls > 0 || self.staged == Some(number) {
            // A failed part stops the rest.
            let stop = job.calls == 0 && job.errno != 0;
            if !stop {
                return;
            }
            self.staged = None;
        }
        if std::mem::take(&mut job.flush_after) && job.errno == 0 {
            self.flushes.push(number);
            return;
        }
        self.finish(number);
    }

    pub(super) fn finish(&mut self, number: u32) {
        let job = &mut self.jobs[number as usize];
        job.used = false;
        job.bufs.clear();
        self.done.push(Done { token: job.token, errno: job.errno });
        self.in_use -= 1;
        self.free_jobs.push(number);
    }

    /// The disk is disabled: nothing that is open will be answered.
    pub(super) fn give_up(&mut self) -> bool {
        let any = self.in_use > 0;
        self.staged = None;
        self.flushes.clear();
        for number in 0..self.jobs.len() as u32 {
            if self.jobs[number as usize].used {
                self.jobs[number as usize].errno = io_error();
                self.finish(number);
            }
        }
        any
    }
}
