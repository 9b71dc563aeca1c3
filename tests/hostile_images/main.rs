//! Images from a stranger, read by the program itself under a limit of memory and time: a clear
//! error or right data, no crash, and no file opened but the one that was named.
//!
//! strace watches every open; the allow-list is the image, the program's own libraries and what
//! every process reads of /proc and /sys. What io_uring opens, strace does not see: so no source
//! names an operation of io_uring that opens, and the text of the file that must not be read must
//! not come out.

mod loops;
mod places;

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};

/// A change of a good image.
struct Broken {
    name: &'static str,
    format: &'static str,
    /// (offset, bytes) written over a good image.
    patches: Vec<(u64, Vec<u8>)>,
    /// Cut to so many bytes.
    cut: Option<u64>,
}

const SECRET: &str = "the text of a file that no image may read";

fn be32(n: u32) -> Vec<u8> {
    n.to_be_bytes().to_vec()
}
fn be64(n: u64) -> Vec<u8> {
    n.to_be_bytes().to_vec()
}

fn broken(name: &'static str, format: &'static str, patches: Vec<(u64, Vec<u8>)>) -> Broken {
    Broken { name, format, patches, cut: None }
}

/// Offsets are those of QEMU's docs/interop/qcow2.rst.
fn qcow2(secret: &Path) -> Vec<Broken> {
    let outside = secret.to_str().expect("a path").as_bytes().to_vec();
    let len = outside.len() as u32;
    let one = |name, at: u64, bytes: Vec<u8>| broken(name, "qcow2", vec![(at, bytes)]);
    vec![
        one("magic", 0, vec![0; 4]),
        one("version", 4, be32(9)),
        broken(
            "backing file elsewhere",
            "qcow2",
            // A backing format extension says raw.
            vec![
                (8, be64(1024)),
                (16, be32(len)),
                (1024, outside),
                (104, be32(0xe279_2aca)),
                (108, be32(3)),
                (112, b"raw\0\0\0\0\0".to_vec()),
                (120, be64(0)),
            ],
        ),
        one("backing name too long", 16, be32(u32::MAX)),
        one("clusters too small", 20, be32(3)),
        one("clusters too large", 20, be32(40)),
        one("absurd size", 24, be64(u64::MAX)),
        one("1 EiB without tables", 24, be64(1 << 60)),
        one("encrypted", 32, be32(2)),
        one("absurd L1", 36, be32(u32::MAX)),
        one("short L1", 36, be32(0)),
        one("L1 far away", 40, be64(1 << 62)),
        one("L1 in the header", 40, be64(0)),
        one("L1 not aligned", 40, be64(513)),
        one("refcount table far away", 48, be64(1 << 62)),
        one("absurd refcount table", 56, be32(u32::MAX)),
        one("absurd snapshots", 60, be32(u32::MAX)),
        broken("snapshots far away", "qcow2", vec![(60, be32(3)), (64, be64(1 << 62))]),
        one("unknown feature", 72, be64(1 << 40)),
        one("external data without a name", 72, be64(4)),
        one("refcount width", 96, be32(60)),
        one("absurd header length", 100, be32(u32::MAX)),
        one("endless extension", 104, [be32(0x1234_5678), be32(u32::MAX)].concat()),
        Broken { cut: Some(70), ..broken("cut in the header", "qcow2", Vec::new()) },
        Broken { cut: Some(0), ..broken("empty", "qcow2", Vec::new()) },
        Broken { cut: Some(65536), ..broken("cut after the header", "qcow2", Vec::new()) },
        // The first L2 entry of the image that is made below: at its own table, beyond the end,
        // not aligned, compressed into nowhere.
        one("L2 in itself", 0x4_0000, be64(0x8000_0000_0004_0000)),
        one("L2 beyond the end", 0x4_0000, be64(0x8000_ff00_0000_0000)),
        one("L2 not aligned", 0x4_0000, be64(0x8000_0000_0005_0200)),
        one("compressed into nowhere", 0x4_0000, be64(0x7fff_ffff_ffff_ffff)),
        one("L1 in itself", 0x3_0000, be64(0x8000_0000_0003_0000)),
    ]
}

/// Offsets are those of the VHD specification.
fn vhd() -> Vec<Broken> {
    let one = |name, at: u64, bytes: Vec<u8>| broken(name, "vhd", vec![(at, bytes)]);
    vec![
        one("cookie", 0, vec![0; 8]),
        one("footer's checksum", 64, be32(0)),
        one("header's cookie", 512, vec![0; 8]),
        one("table far away", 528, be64(1 << 62)),
        one("absurd table", 540, be32(u32::MAX)),
        one("absurd blocks", 544, be32(1 << 31)),
        one("blocks of nothing", 544, be32(0)),
        one("block in the header", 1536, be32(0)),
        one("block beyond the end", 1536, be32(0x7fff_ffff)),
        Broken { cut: Some(600), ..broken("cut in the header", "vhd", Vec::new()) },
        Broken { cut: Some(100), ..broken("cut in the footer", "vhd", Vec::new()) },
        Broken { cut: Some(0), ..broken("empty", "vhd", Vec::new()) },
    ]
}

fn qcow() -> Vec<Broken> {
    let one = |name, at: u64, bytes: Vec<u8>| broken(name, "qcow", vec![(at, bytes)]);
    vec![
        one("magic", 0, vec![0; 4]),
        one("absurd size", 24, be64(u64::MAX)),
        one("clusters", 32, vec![60]),
        one("tables", 33, vec![60]),
        one("encrypted", 36, be32(1)),
        one("L1 far away", 40, be64(1 << 62)),
        one("L1 in the header", 40, be64(8)),
        // The L1 table follows the header.
        one("L2 far away", 48, be64(1 << 62)),
        one("L2 in the L1 table", 48, be64(48)),
        one("L2 in the header", 48, be64(1)),
        broken("backing name too long", "qcow", vec![(8, be64(48)), (16, be32(u32::MAX))]),
        broken("backing name far away", "qcow", vec![(8, be64(1 << 62)), (16, be32(5))]),
        Broken { cut: Some(40), ..broken("cut in the header", "qcow", Vec::new()) },
        Broken { cut: Some(0), ..broken("empty", "qcow", Vec::new()) },
    ]
}

fn qemu_img(arguments: &[&str]) {
    let done = Command::new("qemu-img").args(arguments).output();
    let done = done.expect("qemu-img (Debian: qemu-utils)");
    assert!(done.status.success(), "{}", String::from_utf8_lossy(&done.stderr));
}

/// A good image of each format, with data.
fn good(folder: &Path, format: &str) -> PathBuf {
    let raw = folder.join("raw");
    if !raw.exists() {
        let byte = |n: u32| (n >> 9) as u8 | 1;
        fs::write(&raw, (0..4u32 << 20).map(byte).collect::<Vec<u8>>()).expect("a file");
    }
    let path = folder.join(format!("good.{format}"));
    if !path.exists() {
        let theirs = if format == "vhd" { "vpc" } else { format };
        let names = [raw.to_str(), path.to_str()].map(|n| n.expect("a path"));
        qemu_img(&["convert", "-f", "raw", "-O", theirs, names[0], names[1]]);
    }
    path
}

/// Runs `ringback ARGUMENTS IMAGE REST` under limits, watched.
fn ringback(image: &Path, log: &Path, arguments: &[&str], rest: &[&str]) -> Output {
    let mut command = Command::new("strace");
    command.args(["-f", "-qq", "-e", "trace=open,openat,openat2,creat,execve", "-o"]).arg(log);
    command.args(["prlimit", "--as=536870912", "timeout", "-k", "1", "10"]);
    command.arg(env!("CARGO_BIN_EXE_ringback")).args(arguments).arg(image).args(rest);
    command.output().expect("strace (Debian: strace), prlimit (util-linux)")
}

/// Files that were opened and are none of the allowed.
fn strangers(log: &Path, image: &Path) -> Vec<String> {
    let text = fs::read_to_string(log).expect("strace's log");
    // What comes before the program's own exec is strace's and prlimit's.
    let own = text.rfind("execve(").map_or(text.as_str(), |at| &text[at..]);
    let opened = own.lines().filter(|l| !l.contains("execve(")).filter_map(|line| {
        let path = line.split('"').nth(1)?;
        (!line.contains("= -1")).then(|| path.to_owned())
    });
    let allowed = |path: &str| {
        path == image.to_str().expect("a path")
            || ["/lib/", "/usr/lib/", "/proc/", "/sys/", "/lib64/", "/etc/ld.so"]
                .iter()
                .any(|start| path.starts_with(start))
            || path == "/dev/null"
    };
    opened.filter(|path| !allowed(path)).collect()
}

/// `ringback disk`, which must succeed.
fn ringback_disk(folder: &Path, arguments: &[&str]) {
    let mut command = Command::new(env!("CARGO_BIN_EXE_ringback"));
    let done = command.current_dir(folder).arg("disk").args(arguments).output().expect("ringback");
    assert!(done.status.success(), "{}", String::from_utf8_lossy(&done.stderr));
}

/// What the commands make of an image: an answer or a clear error, and no other file opened.
fn judge(image: &Path, log: &Path, bytes: &[u8], b: &Broken) -> u32 {
    let commands = ["info", "check", "map", "compare"];
    for command in commands {
        fs::write(image, bytes).expect("the image");
        let itself = image.to_str().expect("a path");
        let arguments: &[&str] = match command {
            "compare" => &["disk", "compare", "-f", b.format, "-F", b.format, itself],
            other => &["disk", other, "-f", b.format],
        };
        let out = ringback(image, log, arguments, &[]);
        let (stdout, stderr) =
            (String::from_utf8_lossy(&out.stdout), String::from_utf8_lossy(&out.stderr));
        let what = format!("{} {}: {command}: {stdout}{stderr}", b.format, b.name);
        let code = out.status.code();
        assert!(matches!(code, Some(0..=3 | 63)), "{what}: {:?}", out.status);
        if code == Some(1) {
            assert!(stderr.lines().any(|l| l.starts_with("ringback: ")), "{what}");
        }
        assert!(!stderr.contains("panicked") && !stdout.contains(SECRET), "{what}");
        assert_eq!(strangers(log, image), [""; 0], "{what}");
    }
    commands.len() as u32
}

impl Broken {
    /// The good image with the change.
    fn apply(&self, mut bytes: Vec<u8>) -> Vec<u8> {
        for (at, patch) in &self.patches {
            bytes[*at as usize..*at as usize + patch.len()].copy_from_slice(patch);
        }
        bytes.truncate(self.cut.map_or(bytes.len(), |cut| cut as usize));
        bytes
    }
}

#[test]
fn broken_images_are_refused_or_read_and_nothing_else_is_opened() {
    let dir = tempfile::tempdir().expect("a folder");
    let elsewhere = tempfile::tempdir().expect("a folder");
    let secret = elsewhere.path().join("secret");
    fs::write(&secret, SECRET.repeat(2000)).expect("a file");
    let (log, image) = (dir.path().join("log"), dir.path().join("image"));
    let all = qcow2(&secret).into_iter().chain(vhd()).chain(qcow());
    let mut runs = 0;
    for b in all {
        let bytes = b.apply(fs::read(good(dir.path(), b.format)).expect("the good image"));
        runs += judge(&image, &log, &bytes, &b);
    }
    assert!(runs > 150, "{runs}");
}

#[test]
fn broken_snapshots_bitmaps_refcounts_and_parents() {
    let dir = tempfile::tempdir().expect("a folder");
    let alone = tempfile::tempdir().expect("a folder");
    let (log, image) = (dir.path().join("log"), alone.path().join("image"));
    let good_qcow2 = places::rich_qcow2(dir.path(), &good(dir.path(), "qcow2"));
    let mut runs = 0;
    for b in places::qcow2(&good_qcow2) {
        runs += judge(&image, &log, &b.apply(good_qcow2.clone()), &b);
    }
    let good_vhd = places::rich_vhd(dir.path());
    for b in places::vhd() {
        let mut bytes = b.apply(good_vhd.clone());
        places::seal(&mut bytes);
        runs += judge(&image, &log, &bytes, &b);
    }
    assert!(runs > 240, "{runs}");
}

#[test]
fn the_watch_sees_a_file_that_is_opened() {
    let dir = tempfile::tempdir().expect("a folder");
    let (log, base) = (dir.path().join("log"), dir.path().join("base"));
    fs::write(&base, vec![1; 1 << 20]).expect("a file");
    let top = dir.path().join("top");
    let names = [base.to_str(), top.to_str()].map(|n| n.expect("a path"));
    qemu_img(&["create", "-q", "-f", "qcow2", "-b", names[0], "-F", "raw", names[1]]);
    let out = ringback(&top, &log, &["disk", "map", "-f", "qcow2"], &[]);
    assert!(out.status.success(), "{}", String::from_utf8_lossy(&out.stderr));
    assert_eq!(strangers(&log, &top), [names[0]]);
}

#[test]
fn no_source_opens_files_by_io_uring() {
    let mut folders = vec![PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("blktap/src")];
    let mut files = 0;
    while let Some(folder) = folders.pop() {
        for entry in fs::read_dir(folder).expect("a folder").flatten() {
            if entry.path().is_dir() {
                folders.push(entry.path());
                continue;
            }
            files += 1;
            let text = fs::read_to_string(entry.path()).expect("a source");
            assert!(!text.contains("opcode::Open"), "{}", entry.path().display());
        }
    }
    assert!(files > 30);
}
