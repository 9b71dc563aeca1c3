//! `ringback export vhost-user-blk` under a real guest: QEMU with Debian's kernel and its virtio
//! driver, which makes a file system, verifies what it wrote, sees a new size, and notices
//! nothing when the back-end is killed under load.

mod guest;

use std::io::{BufRead, BufReader};
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::Mutex;
use std::time::{Duration, Instant};

use guest::Guest;
use rustix::process::{Pid, Signal, kill_process};

/// Guests at once: each takes both processors.
static ONE: Mutex<()> = Mutex::new(());
const MIB: u64 = 1 << 20;

/// A back-end process.
struct Backend(Option<Child>);

impl Backend {
    fn start(socket: &Path, image: &Path) -> Backend {
        let mut command = Command::new(env!("CARGO_BIN_EXE_ringback"));
        command.args(["export", "vhost-user-blk", "--num-queues", "2", "--cache", "writeback"]);
        command.arg("--socket-path").arg(socket).arg(image).env("RINGBACK_LOG", "warn");
        command.args(["--serial", "a-disk"]);
        let mut child =
            command.stdin(Stdio::null()).stdout(Stdio::piped()).spawn().expect("ringback");
        let mut line = String::new();
        let out = child.stdout.take().expect("its output");
        BufReader::new(out).read_line(&mut line).expect("a line");
        assert!(line.starts_with("listening at "), "{line:?}");
        Backend(Some(child))
    }
    fn kill(mut self) {
        let mut child = self.0.take().expect("running");
        child.kill().expect("SIGKILL");
        child.wait().expect("its end");
    }
    /// SIGTERM, and a good end.
    fn end(mut self) {
        let mut child = self.0.take().expect("running");
        kill_process(Pid::from_child(&child), Signal::TERM).expect("SIGTERM");
        let status = child.wait().expect("its end");
        assert!(status.success(), "{status}");
    }
}

impl Drop for Backend {
    fn drop(&mut self) {
        if let Some(mut child) = self.0.take() {
            let _ = child.kill();
            let _ = child.wait();
        }
    }
}

fn image(folder: &Path) -> PathBuf {
    let path = folder.join("disk");
    std::fs::File::create(&path).expect("a file").set_len(192 * MIB).expect("its size");
    path
}

fn fio(name: &str, more: &str) -> String {
    format!(
        "fio --name={name} --filename=/dev/vda --ioengine=libaio --direct=1 --verify=crc32c \
         --verify_fatal=1 --iodepth=32 --minimal {more}"
    )
}

/// The guest's word on the device, and what it does with it.
fn uses_the_disk(guest: &mut Guest, image: &Path) {
    assert_eq!(guest.run("cat /sys/block/vda/size"), (192 * MIB / 512).to_string());
    assert_eq!(guest.run("cat /sys/block/vda/serial"), "a-disk");
    assert_eq!(guest.run("ls /sys/block/vda/mq | wc -l"), "2", "queues");
    assert_eq!(guest.run("cat /sys/block/vda/queue/write_cache"), "write back");
    guest.run("mkfs.ext4 -q /dev/vda && mount -o discard /dev/vda /mnt");
    guest.run("dd if=/dev/urandom of=/mnt/a bs=1M count=64 && sha256sum /mnt/a > /tmp/sum && sync");
    let full = std::fs::metadata(image).expect("the image").blocks();
    guest.run("umount /mnt && mount -o discard /dev/vda /mnt && sha256sum -c /tmp/sum");
    guest.run("rm /mnt/a && sync && fstrim /mnt && umount /mnt && e2fsck -fn /dev/vda");
    let trimmed = std::fs::metadata(image).expect("the image").blocks();
    assert!(trimmed * 512 + 48 * MIB < full * 512, "{trimmed} of {full} blocks after fstrim");
    guest.run(&fio("random", "--rw=randwrite --bsrange=4k-256k --blockalign=4k --size=24M"));
}

fn sees_a_new_size(guest: &mut Guest, image: &Path) {
    let file = std::fs::OpenOptions::new().read(true).write(true).open(image).expect("the image");
    file.set_len(256 * MIB).expect("a new size");
    let wanted = (256 * MIB / 512).to_string();
    let end = Instant::now() + Duration::from_secs(20);
    while guest.run("cat /sys/block/vda/size") != wanted {
        assert!(Instant::now() < end, "the guest does not see the new size");
        std::thread::sleep(Duration::from_millis(200));
    }
    guest.run("echo the-new-end | dd of=/dev/vda bs=512 seek=524287 conv=sync oflag=direct");
    let mut bytes = [0; 11];
    file.read_exact_at(&mut bytes, 256 * MIB - 512).expect("its last sector");
    assert_eq!(&bytes, b"the-new-end");
}

/// The back-end is killed while fio writes, again and again.
fn survives_kills(guest: &mut Guest, socket: &Path, image: &Path, first: Backend) -> Backend {
    let mut backend = first;
    guest.begin(&fio("kills", "--rw=randwrite --bs=4k --size=96M --rate_iops=3000"));
    for _ in 0..3 {
        std::thread::sleep(Duration::from_millis(1500));
        backend.kill();
        backend = Backend::start(socket, image);
    }
    let answer = guest.finish();
    assert_eq!(answer.status, 0, "fio:\n{}", answer.text);
    let errors = guest.errors();
    assert!(errors.is_empty(), "{errors}");
    backend
}

fn guest_with(options: &str) {
    let _one = ONE.lock().unwrap_or_else(|e| e.into_inner());
    let folder = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).expect("a folder");
    let (socket, image) = (folder.path().join("sock"), image(folder.path()));
    let backend = Backend::start(&socket, &image);
    let mut guest = Guest::boot(&socket, &format!("num-queues=2,{options}"));
    uses_the_disk(&mut guest, &image);
    sees_a_new_size(&mut guest, &image);
    let backend = survives_kills(&mut guest, &socket, &image, backend);
    drop(guest);
    backend.end();
    assert!(!socket.exists(), "the socket is left");
}

#[test]
fn split_rings() {
    guest_with("packed=off");
}

#[test]
fn packed_rings() {
    guest_with("packed=on");
}
