//! Image locks, against QEMU's own programs and between processes.
mod support;

use std::io::{BufRead, BufReader, Write};
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::{Child, ChildStdin, Command, Output, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use blktap::storage::{Access, Cache, Lock, OpenError, OpenOptions, Sharing};
use blktap::{Disk, Op, RawDisk, blocking};
use support::{folder, image, pattern};

const SIZE: u64 = 1 << 20;
const CHILD_IMAGE: &str = "BLKTAP_TEST_IMAGE";

fn held(sharing: Sharing, wait_ms: u64) -> Lock {
    Lock::Held { sharing, wait: Duration::from_millis(wait_ms) }
}

fn once(path: &Path, access: Access, sharing: Sharing) -> OpenOptions {
    OpenOptions::new(path).access(access).lock(held(sharing, 0))
}

fn qemu(program: &str, args: &[&str], path: &Path) -> Output {
    Command::new(program)
        .args(args)
        .arg(path)
        .output()
        .unwrap_or_else(|e| panic!("{program} (Debian's qemu-utils) does not run: {e}"))
}

/// qemu-io with the image open; killed when dropped.
struct QemuIo {
    child: Child,
    _input: ChildStdin,
}

impl QemuIo {
    fn open(path: &Path, options: &[&str]) -> Self {
        let mut child = Command::new("qemu-io")
            .args(["-f", "raw"])
            .args(options)
            .arg(path)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .expect("qemu-io (Debian's qemu-utils)");
        let mut input = child.stdin.take().expect("its input");
        let mut output = BufReader::new(child.stdout.take().expect("its output"));
        input.write_all(b"read 0 512\n").expect("a command");
        let mut line = String::new();
        while !line.contains("read 512/512") {
            line.clear();
            assert_ne!(output.read_line(&mut line).expect("its answer"), 0, "qemu-io ended");
        }
        QemuIo { child, _input: input }
    }
}

impl Drop for QemuIo {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

#[test]
fn qemu_cannot_write_or_convert_what_is_served() {
    let dir = folder();
    let path = image(&dir, "a.raw", SIZE);
    let disk = RawDisk::open(&OpenOptions::new(&path)).expect("open");
    let text = |o: &Output| String::from_utf8_lossy(&o.stderr).into_owned();
    let write = qemu("qemu-io", &["-f", "raw", "-c", "write 0 512"], &path);
    assert!(!write.status.success() && text(&write).contains("Failed to get \"write\" lock"));
    let resize = Command::new("qemu-img")
        .args(["resize", "-f", "raw"])
        .arg(&path)
        .arg("2M")
        .output()
        .expect("qemu-img");
    assert!(!resize.status.success() && text(&resize).contains("lock"), "{resize:?}");
    let out = dir.path().join("copy.raw");
    let copy = Command::new("qemu-img")
        .args(["convert", "-f", "raw", "-O", "raw"])
        .args([&path, &out])
        .output()
        .expect("qemu-img");
    assert!(!copy.status.success() && text(&copy).contains("Failed to get shared \"write\" lock"));
    let forced = Command::new("qemu-img")
        .args(["convert", "-U", "-f", "raw", "-O", "raw"])
        .args([&path, &out])
        .output()
        .expect("qemu-img");
    assert!(forced.status.success(), "{}", text(&forced));
    // A queue alone keeps the lock; dropping it gives the image back at once.
    let mut queue = disk.queue(4).expect("queue");
    blocking::write_at(&mut *queue, 0, &[1; 512]).expect("write");
    drop(disk);
    assert!(!qemu("qemu-io", &["-f", "raw", "-c", "write 0 512"], &path).status.success());
    drop(queue);
    assert!(qemu("qemu-io", &["-f", "raw", "-c", "write 0 512"], &path).status.success());
}

#[test]
fn what_qemu_writes_is_refused_and_what_it_reads_can_be_read() {
    let dir = folder();
    let path = image(&dir, "a.raw", SIZE);
    let writer = QemuIo::open(&path, &[]);
    for access in [Access::ReadOnly, Access::ReadWrite] {
        let start = Instant::now();
        let options = OpenOptions::new(&path).access(access).lock(held(Sharing::Exclusive, 150));
        let error = RawDisk::open(&options).map(drop).expect_err("in use");
        assert!(start.elapsed() >= Duration::from_millis(150), "it waits");
        assert!(matches!(error, OpenError::Locked { .. }), "{error}");
        let text = error.to_string();
        assert!(text.contains("in use by another process") && text.contains("lock"), "{text}");
    }
    drop(writer);
    let _reader = QemuIo::open(&path, &["-r"]);
    RawDisk::open(&once(&path, Access::ReadOnly, Sharing::Exclusive)).expect("two readers");
    RawDisk::open(&once(&path, Access::ReadWrite, Sharing::Exclusive).lock(Lock::Off))
        .expect("without a lock");
}

#[test]
fn readers_share_writers_do_not_unless_both_say_so() {
    let dir = folder();
    let path = image(&dir, "a.raw", SIZE);
    use Access::{ReadOnly, ReadWrite};
    use Sharing::{Exclusive, Shared};
    let allowed = [
        ((ReadOnly, Exclusive), (ReadOnly, Exclusive), true),
        ((ReadOnly, Exclusive), (ReadWrite, Exclusive), false),
        ((ReadWrite, Exclusive), (ReadOnly, Exclusive), false),
        ((ReadWrite, Exclusive), (ReadWrite, Exclusive), false),
        ((ReadWrite, Shared), (ReadWrite, Shared), true),
        ((ReadWrite, Shared), (ReadWrite, Exclusive), false),
        ((ReadWrite, Exclusive), (ReadWrite, Shared), false),
        ((ReadWrite, Shared), (ReadOnly, Shared), true),
        ((ReadWrite, Shared), (ReadOnly, Exclusive), false),
    ];
    for (first, second, both) in allowed {
        let one = RawDisk::open(&once(&path, first.0, first.1)).expect("the first");
        let two = RawDisk::open(&once(&path, second.0, second.1));
        assert_eq!(two.is_ok(), both, "{first:?} then {second:?}");
        drop((one, two));
    }
    RawDisk::open(&once(&path, ReadWrite, Exclusive)).expect("a refused open leaves no lock");
}

#[test]
fn a_successor_waits_for_its_predecessor() {
    let dir = folder();
    let path = image(&dir, "a.raw", SIZE);
    let first = RawDisk::open(&OpenOptions::new(&path)).expect("open");
    let holder = thread::spawn(move || {
        thread::sleep(Duration::from_millis(200));
        drop(first);
    });
    let start = Instant::now();
    let options = OpenOptions::new(&path).lock(held(Sharing::Exclusive, 5000));
    RawDisk::open(&options).expect("free after a while");
    let waited = start.elapsed();
    assert!(waited >= Duration::from_millis(190) && waited < Duration::from_secs(3), "{waited:?}");
    holder.join().expect("holder");
}

/// The process that is killed: writes its pattern over and over, 32 deep, and says so.
#[test]
#[ignore = "run by killed_in_mid_write_the_lock_passes_on_and_no_old_write_lands_later"]
fn child_writes_until_killed() {
    let path = std::env::var(CHILD_IMAGE).expect("an image");
    let disk = RawDisk::open(&OpenOptions::new(path)).expect("open");
    let mut queue = disk.queue(32).expect("queue");
    let mut memory: Vec<_> = (0..32).map(|n| support::Memory::of(&pattern(n, 32768), 0)).collect();
    let bufs: Vec<_> = memory.iter_mut().map(|m| [m.buf()]).collect();
    let mut done = Vec::new();
    let send = |queue: &mut dyn blktap::DiskQueue, n: usize| {
        let op = if n.is_multiple_of(4) { Op::WriteFua } else { Op::Write };
        queue.submit(&support::request(op, n as u64 * 32768, &bufs[n], n as u64)).expect("room");
    };
    (0..32).for_each(|n| send(&mut *queue, n));
    let mut writes = 0u64;
    loop {
        queue.wait(&[], None).expect("wait");
        queue.poll(&mut done).expect("poll");
        for d in done.drain(..) {
            assert_eq!(d.errno, 0);
            writes += 1;
            if writes == 100 {
                eprintln!("writing");
            }
            send(&mut *queue, d.token as usize);
        }
    }
}

#[test]
fn killed_in_mid_write_the_lock_passes_on_and_no_old_write_lands_later() {
    let dir = folder();
    for round in 0..5 {
        let path = image(&dir, &format!("{round}.raw"), SIZE);
        let mut child = Command::new(std::env::current_exe().expect("this test"))
            .args(["--exact", "child_writes_until_killed", "--ignored", "--nocapture"])
            .env(CHILD_IMAGE, &path)
            .stderr(Stdio::piped())
            .stdout(Stdio::null())
            .process_group(0)
            .spawn()
            .expect("child");
        let mut says = BufReader::new(child.stderr.take().expect("its words"));
        let mut line = String::new();
        says.read_line(&mut line).expect("a line");
        assert_eq!(line, "writing\n");
        let refused = RawDisk::open(&once(&path, Access::ReadWrite, Sharing::Exclusive));
        assert!(refused.is_err(), "the child holds it");
        child.kill().expect("kill -9");
        let disk = RawDisk::open(&OpenOptions::new(&path)).expect("handed over");
        let mut queue = disk.queue(1).expect("queue");
        let mine = pattern(77, SIZE as usize);
        blocking::write_at(&mut *queue, 0, &mine).expect("write");
        child.wait().expect("its end");
        thread::sleep(Duration::from_millis(200));
        let mut back = vec![0; SIZE as usize];
        blocking::read_at(&mut *queue, 0, &mut back).expect("read");
        assert!(back == mine, "round {round}: an old write landed on newer data");
    }
}

#[test]
fn openings_that_cannot_work_say_what_to_do() {
    let dir = folder();
    let open =
        |p: &Path| RawDisk::open(&OpenOptions::new(p)).map(drop).expect_err("refused").to_string();
    assert!(open(&dir.path().join("none")).ends_with("none: no such file or device"));
    assert!(open(dir.path()).contains("is a directory"));
    assert!(open(Path::new("/dev/null")).contains("neither a regular file nor a block device"));
    let socket = dir.path().join("socket");
    std::os::unix::net::UnixListener::bind(&socket).expect("socket");
    assert!(open(&socket).contains("neither a regular file"));
    let path = image(&dir, "a.raw", SIZE);
    for asked in [0, 513, 256, 8192] {
        let block = blktap::storage::BlockSize::Bytes(asked);
        let options = OpenOptions::new(&path).logical_block(block);
        let error = RawDisk::open(&options).map(drop).expect_err("refused").to_string();
        assert!(error.contains("512, 1024, 2048 or 4096"), "{error}");
    }
}

/// Opens the image as a user who may not: root may everything.
#[test]
#[ignore = "run by permission_is_named"]
fn child_is_not_permitted() {
    let path = std::env::var(CHILD_IMAGE).expect("an image");
    let open = |access| {
        let options = OpenOptions::new(&path).access(access).cache(Cache::Writeback);
        RawDisk::open(&options).map(drop).expect_err("refused").to_string()
    };
    let (read, write) = (open(Access::ReadOnly), open(Access::ReadWrite));
    assert!(read.contains("permission denied") && read.contains("read access"), "{read}");
    assert!(write.contains("read and write access"), "{write}");
}

#[test]
fn permission_is_named() {
    use std::os::unix::fs::PermissionsExt;
    // Every user can reach /tmp; the build's own folders may be closed to others.
    let dir = tempfile::tempdir_in("/tmp").expect("a folder");
    std::fs::set_permissions(dir.path(), PermissionsExt::from_mode(0o755)).expect("chmod");
    let path = image(&dir, "a.raw", SIZE);
    std::fs::set_permissions(&path, PermissionsExt::from_mode(0o000)).expect("chmod");
    let program = dir.path().join("test");
    std::fs::copy(std::env::current_exe().expect("this test"), &program).expect("copy");
    let mut command = Command::new(program);
    command.args(["--exact", "child_is_not_permitted", "--ignored"]).env(CHILD_IMAGE, &path);
    if rustix::process::geteuid().is_root() {
        command.uid(65534).gid(65534);
    }
    let output = command.current_dir("/").output().expect("child");
    let text = String::from_utf8_lossy(&output.stdout);
    assert!(output.status.success() && text.contains("1 passed"), "{text}");
}
