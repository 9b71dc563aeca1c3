//! Making a ring: the newest mode that the kernel has, or a refusal that names the remedy.

use std::io;
use std::os::fd::{AsRawFd, OwnedFd, RawFd};

use io_uring::IoUring;
use rustix::pipe::{PipeFlags, pipe_with};
use rustix::process::{Resource, getrlimit};

/// How completions are delivered; each is tried in turn until the kernel takes one.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum RingMode {
    /// Any kernel since 5.10: completions interrupt the thread.
    Plain,
    /// Since 5.19 (COOP_TASKRUN): completions wait for the thread's next system call.
    Cooperative,
    /// Since 6.1 (SINGLE_ISSUER, DEFER_TASKRUN): completions run in the thread's own enter.
    Deferred,
}

/// Why no ring could be made. The text says what to do.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub enum SetupError {
    /// `kernel.io_uring_disabled` is 1 or 2.
    #[error(
        "io_uring is switched off on this host (kernel.io_uring_disabled={value}): \
         run `sysctl kernel.io_uring_disabled=0`{}",
        if *.value == 1 { ", or put this process into the group of kernel.io_uring_group" } else { "" }
    )]
    Disabled {
        /// The knob's value.
        value: u32,
    },
    /// A seccomp filter or another policy said no.
    #[error(
        "io_uring is forbidden to this process ({errno}), probably by a seccomp filter: allow \
         io_uring_setup, io_uring_enter and io_uring_register (systemd: SystemCallFilter=@io-uring; \
         containers: the runtime's seccomp profile)",
        errno = io::Error::from_raw_os_error(*.0)
    )]
    Forbidden(i32),
    /// The system call is not there.
    #[error(
        "this kernel has no io_uring, or a seccomp filter hides it: use Linux 5.10 or later with \
         CONFIG_IO_URING, and allow io_uring_setup, io_uring_enter and io_uring_register"
    )]
    Missing,
    /// The kernel is too old.
    #[error("this kernel's io_uring is too old (it lacks {0}): use Linux 5.10 or later")]
    TooOld(&'static str),
    /// Kernels before 5.12 charge rings to the memory-lock limit.
    #[error(
        "the memory-lock limit ({limit}) is too low for io_uring's rings: raise RLIMIT_MEMLOCK \
         (systemd: LimitMEMLOCK=64M; shell: `ulimit -l 65536`), or free memory"
    )]
    MemoryLock {
        /// The present limit, in words.
        limit: String,
    },
    /// No descriptors left.
    #[error(
        "too many open descriptors for another queue: raise RLIMIT_NOFILE (systemd: LimitNOFILE=)"
    )]
    Descriptors,
    /// More requests at once than an engine holds.
    #[error("a queue holds 1 to {most} requests, not {asked}", most = super::MAX_DEPTH, asked = .0)]
    Depth(u32),
    /// Anything else.
    #[error("cannot set up io_uring: {}", io::Error::from_raw_os_error(*.0))]
    Other(i32),
}

impl From<SetupError> for io::Error {
    fn from(e: SetupError) -> Self {
        let kind = match &e {
            SetupError::Disabled { .. } | SetupError::Forbidden(_) => {
                io::ErrorKind::PermissionDenied
            }
            SetupError::Missing | SetupError::TooOld(_) => io::ErrorKind::Unsupported,
            SetupError::MemoryLock { .. } => io::ErrorKind::OutOfMemory,
            SetupError::Depth(_) => io::ErrorKind::InvalidInput,
            SetupError::Descriptors | SetupError::Other(_) => io::ErrorKind::Other,
        };
        io::Error::new(kind, e)
    }
}

impl SetupError {
    /// What an errno of io_uring_setup means; `disabled` is kernel.io_uring_disabled, `memlock`
    /// the present memory-lock limit in bytes (`None`: unlimited).
    pub fn explain(errno: i32, disabled: u32, memlock: Option<u64>) -> Self {
        match errno {
            libc::EPERM if disabled != 0 => SetupError::Disabled { value: disabled },
            libc::EPERM | libc::EACCES => SetupError::Forbidden(errno),
            libc::ENOSYS => SetupError::Missing,
            libc::ENOMEM => SetupError::MemoryLock {
                limit: memlock.map_or("unlimited".into(), |b| format!("{} KiB", b / 1024)),
            },
            libc::EMFILE | libc::ENFILE => SetupError::Descriptors,
            e => SetupError::Other(e),
        }
    }

    fn of(e: &io::Error) -> Self {
        let disabled = std::fs::read_to_string("/proc/sys/kernel/io_uring_disabled")
            .ok()
            .and_then(|s| s.trim().parse().ok())
            .unwrap_or(0);
        let memlock = getrlimit(Resource::Memlock).current;
        Self::explain(e.raw_os_error().unwrap_or(0), disabled, memlock)
    }
}

/// The read end of a pipe whose only write end is registered with a ring: it ends when the kernel
/// has let go of the ring and of every request in it.
pub(super) struct Fence {
    end: OwnedFd,
}

impl Fence {
    /// Waits until the kernel is done with the (already closed) ring.
    pub(super) fn wait(&self) {
        let mut byte = [0u8; 1];
        loop {
            match rustix::io::read(&self.end, &mut byte) {
                Err(rustix::io::Errno::INTR) => {}
                _ => return,
            }
        }
    }
}

/// A ring that is not yet enabled, the mode it got, and its fence.
pub(super) struct Made {
    pub(super) ring: IoUring,
    pub(super) mode: RingMode,
    pub(super) fence: Fence,
}

/// Makes a ring for `entries` submissions with `files` registered in their order.
pub(super) fn make(entries: u32, files: &[RawFd], newest: RingMode) -> Result<Made, SetupError> {
    let (ring, mode) = build(entries, newest)?;
    if !ring.params().is_feature_nodrop() {
        return Err(SetupError::TooOld("IORING_FEAT_NODROP"));
    }
    let (end, registered) =
        pipe_with(PipeFlags::CLOEXEC).map_err(|e| SetupError::of(&io::Error::from(e)))?;
    let mut fds = files.to_vec();
    fds.push(registered.as_raw_fd());
    ring.submitter().register_files(&fds).map_err(|e| SetupError::of(&e))?;
    Ok(Made { ring, mode, fence: Fence { end } })
}

fn build(entries: u32, newest: RingMode) -> Result<(IoUring, RingMode), SetupError> {
    let mut last = libc::EINVAL;
    for mode in [RingMode::Deferred, RingMode::Cooperative, RingMode::Plain] {
        if mode > newest {
            continue;
        }
        let mut builder = IoUring::builder();
        // Enabled by the first thread that enters it: that thread, and not the one that opens
        // the disk, becomes the single issuer.
        builder.setup_r_disabled().setup_clamp().setup_cqsize(entries.saturating_mul(2));
        match mode {
            RingMode::Deferred => {
                builder
                    .setup_submit_all()
                    .setup_single_issuer()
                    .setup_defer_taskrun()
                    .setup_taskrun_flag();
            }
            RingMode::Cooperative => {
                builder.setup_submit_all().setup_coop_taskrun().setup_taskrun_flag();
            }
            RingMode::Plain => {}
        }
        match builder.build(entries) {
            Ok(ring) => return Ok((ring, mode)),
            Err(e) if e.raw_os_error() == Some(libc::EINVAL) => last = libc::EINVAL,
            Err(e) => return Err(SetupError::of(&e)),
        }
    }
    Err(SetupError::Other(last))
}
