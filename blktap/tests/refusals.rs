//! io_uring forbidden for real: a seccomp filter on one thread.
#![allow(unsafe_code)]
mod support;

use std::thread;

use blktap::storage::OpenOptions;
use blktap::{Disk, RawDisk};
use support::{folder, image};

/// `__NR_io_uring_setup`, the same on every architecture.
const IO_URING_SETUP: u32 = 425;

/// Makes io_uring_setup fail with `errno` on this thread from now on.
fn forbid(errno: i32) {
    let filter = |code, jt, jf, k| libc::sock_filter { code: code as u16, jt, jf, k };
    let mut program = [
        // Load the system call's number, the first word of seccomp_data.
        filter(libc::BPF_LD | libc::BPF_W | libc::BPF_ABS, 0, 0, 0),
        filter(libc::BPF_JMP | libc::BPF_JEQ | libc::BPF_K, 0, 1, IO_URING_SETUP),
        filter(libc::BPF_RET | libc::BPF_K, 0, 0, libc::SECCOMP_RET_ERRNO | errno as u32),
        filter(libc::BPF_RET | libc::BPF_K, 0, 0, libc::SECCOMP_RET_ALLOW),
    ];
    let program = libc::sock_fprog { len: program.len() as u16, filter: program.as_mut_ptr() };
    // SAFETY: the program outlives the calls, which copy it; both concern this thread alone.
    unsafe {
        assert_eq!(libc::prctl(libc::PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0), 0);
        let mode = libc::SECCOMP_MODE_FILTER;
        assert_eq!(libc::prctl(libc::PR_SET_SECCOMP, mode, &raw const program), 0, "seccomp");
    }
}

fn refusal(errno: i32) -> String {
    thread::spawn(move || {
        let dir = folder();
        let disk = RawDisk::open(&OpenOptions::new(image(&dir, "a.raw", 4096))).expect("open");
        forbid(errno);
        let error = disk.queue(4).map(drop).expect_err("forbidden").to_string();
        assert_eq!(error, blktap::doctor().expect_err("forbidden").to_string());
        error
    })
    .join()
    .expect("the filtered thread")
}

#[test]
fn a_seccomp_filter_is_named_with_its_remedy() {
    let text = refusal(libc::EPERM);
    // The sysctl, if it is set here, explains an EPERM first.
    let switch = std::fs::read_to_string("/proc/sys/kernel/io_uring_disabled");
    if switch.is_ok_and(|s| s.trim() != "0") {
        assert!(text.contains("kernel.io_uring_disabled"), "{text}");
    } else {
        assert!(text.contains("seccomp") && text.contains("io_uring_enter"), "{text}");
    }
    assert!(refusal(libc::ENOSYS).contains("Linux 5.10"));
    assert!(refusal(libc::ENOMEM).contains("LimitMEMLOCK="));
}
