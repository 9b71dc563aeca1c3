//! Filters as users have them: rates by fio's count, backups by the changed-block log, after a
//! kill too.

use std::io::{BufRead, BufReader};
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::thread::sleep;
use std::time::Duration;

use parking_lot::Mutex;
use serde_json::Value;

/// Rates are measured one at a time.
static ALONE: Mutex<()> = Mutex::new(());

struct Server(Child);

impl Server {
    /// Starts `ringback export nbd` at a socket in the folder.
    fn start(folder: &Path, args: &[&str]) -> Server {
        let mut command = Command::new(env!("CARGO_BIN_EXE_ringback"));
        command.args(["export", "nbd", "-k"]).arg(folder.join("sock")).args(args);
        command.env("RINGBACK_LOG", "warn").stdin(Stdio::null()).stdout(Stdio::piped());
        let mut child = command.spawn().expect("ringback");
        let out = child.stdout.take().expect("its output");
        let mut line = String::new();
        BufReader::new(out).read_line(&mut line).expect("a line");
        assert!(line.starts_with("listening at"), "{line}");
        Server(child)
    }
    /// SIGTERM, and a good end.
    fn end(mut self) {
        let pid = rustix::process::Pid::from_child(&self.0);
        rustix::process::kill_process(pid, rustix::process::Signal::TERM).expect("SIGTERM");
        assert!(self.0.wait().expect("an end").success());
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

fn text(path: &Path) -> &str {
    path.to_str().expect("UTF-8")
}

fn command(program: &str, args: &[&str]) -> Command {
    let mut command = Command::new(program);
    command.args(args).stdin(Stdio::null()).env("RINGBACK_LOG", "warn");
    command
}

fn well(program: &str, args: &[&str]) -> String {
    let output = command(program, args).output();
    let output = output.unwrap_or_else(|e| panic!("{program}: {e}: install fio, libnbd-bin"));
    let error = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{program} {args:?}: {error}");
    String::from_utf8(output.stdout).expect("UTF-8")
}

fn ringback(args: &[&str]) -> String {
    well(env!("CARGO_BIN_EXE_ringback"), args)
}

/// fio on an export.
fn fio(folder: &Path, export: &str, args: &[&str]) -> Command {
    let uri = format!("--uri=nbd+unix:///{export}?socket={}", text(&folder.join("sock")));
    let fixed = ["--name=x", "--ioengine=nbd", "--time_based", "--output-format=json", &uri];
    command("fio", &[&fixed[..], args].concat())
}

/// What fio tells, behind what its engine says.
fn json_of(told: &[u8]) -> Value {
    let told = String::from_utf8_lossy(told);
    serde_json::from_str(&told[told.find('{').expect("JSON")..]).expect("JSON")
}

/// Requests and bytes a second, of reads and writes, by fio's count.
fn rates(fio: &mut Command) -> [f64; 4] {
    let output = fio.output().unwrap_or_else(|e| panic!("fio: {e}: install it"));
    let json = json_of(&output.stdout);
    let of = |way: &str, what: &str| json["jobs"][0][way][what].as_f64().expect("a number");
    [of("read", "iops"), of("write", "iops"), of("read", "bw_bytes"), of("write", "bw_bytes")]
}

/// Measures until all is within 5 % of what is wanted, three times at most: processors that are lent to
/// others for a while distort a run, and a limit that does not hold fails all three.
fn near<const N: usize>(what: &str, wanted: [f64; N], measure: impl Fn() -> [f64; N]) {
    let is_near = |got: &[f64; N]| {
        eprintln!("{what}: {got:.1?} of {wanted:?}");
        got.iter().zip(wanted).all(|(got, wanted)| (got / wanted - 1.0).abs() <= 0.05)
    };
    let got = (0..3).map(|_| measure()).find(is_near);
    assert!(got.is_some(), "{what}: three runs beside {wanted:?}");
}

const NULL: &str = "--null-disk=1073741824";

#[test]
fn rates_are_held_by_fios_count() {
    let (_alone, folder) = (ALONE.lock(), tempfile::tempdir().expect("a folder"));
    let (at, control) = (folder.path(), folder.path().join("control"));
    let random = ["--rw=randread", "--bs=4k", "--iodepth=32", "--runtime=5"];
    let server = Server::start(at, &[NULL, "--throttle", "iops_total=1000"]);
    let reads = || [rates(&mut fio(at, "", &random))[0]];
    near("1000 reads/s", [1000.0], reads);
    server.end();
    let args = [NULL, "--throttle", "bps_total=10M,iops_read=500", "--control", text(&control)];
    let server = Server::start(at, &args);
    let writes = ["--rw=write", "--bs=64k", "--iodepth=8", "--runtime=5"];
    near("10 MiB/s written", [(10 << 20) as f64], || [rates(&mut fio(at, "", &writes))[3]]);
    near("500 reads/s", [500.0], reads);
    // A change reaches those who are at it: the mean of two seconds each.
    let fast = ["--rw=randread", "--bs=4k", "--iodepth=32", "--runtime=4"];
    let running = fio(at, "", &fast).stdout(Stdio::piped()).spawn().expect("fio");
    sleep(Duration::from_millis(2000));
    ringback(&["set", text(&control), "iops_read", "2000"]);
    let told = running.wait_with_output().expect("fio's end").stdout;
    let json = json_of(&told);
    let count = json["jobs"][0]["read"]["total_ios"].as_u64().expect("a number");
    assert!((4000..6200).contains(&count), "{count} reads: the change came late or never");
    near("2000 reads/s", [2000.0], reads);
    server.end();
}

#[test]
fn bursts_are_as_configured() {
    let (_alone, folder) = (ALONE.lock(), tempfile::tempdir().expect("a folder"));
    let limits = "iops_write=500,iops_write_max=2000,iops_write_max_length=3";
    let for_s = |s: &str| ["--rw=randwrite", "--bs=4k", "--iodepth=32", s].map(str::to_owned);
    let run = |s: &str| {
        let server = Server::start(folder.path(), &[NULL, "--throttle", limits]);
        let args = for_s(s);
        let fio = &mut fio(folder.path(), "", &args.each_ref().map(String::as_str));
        let writes = rates(fio)[1];
        server.end();
        [writes]
    };
    near("2000 writes/s in a burst of 3 s", [2000.0], || run("--runtime=3"));
    // The burst has 3 s of 2000, of which 500 a second are paid off meanwhile: it lasts 4 s.
    near("2000 writes/s for 4 s, 500 for 4 s", [1250.0], || run("--runtime=8"));
}

#[test]
fn two_disks_share_a_group() {
    let (_alone, folder) = (ALONE.lock(), tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")));
    let folder = folder.expect("a folder");
    let at = folder.path();
    let mut args = vec!["--cache=writeback", "--throttle=iops_total=1000", "--throttle-group"];
    let exports = ["a", "b"].map(|name| {
        let path = at.join(name);
        std::fs::File::create(&path).expect("a file").set_len(64 << 20).expect("its size");
        format!("--export={name}=raw:{}", text(&path))
    });
    args.extend(exports.iter().map(String::as_str));
    let server = Server::start(at, &args);
    let run = |name: &'static str, depth: &'static str| {
        let args = ["--rw=randread", "--bs=4k", depth, "--runtime=6"];
        let mut fio = fio(at, name, &args);
        std::thread::spawn(move || rates(&mut fio)[0])
    };
    near("both, and the one with 4 on their way", [1000.0, 500.0], || {
        let (deep, shallow) = (run("a", "--iodepth=64"), run("b", "--iodepth=4"));
        let (deep, shallow) = (deep.join().expect("fio"), shallow.join().expect("fio"));
        [deep + shallow, shallow]
    });
    server.end();
}

/// The changed stretches of a log.
fn shown(log: &Path) -> (bool, Vec<(u64, u64)>) {
    let json: Value =
        serde_json::from_str(&ringback(&["changed-log", "show", "--json", text(log)]))
            .expect("JSON");
    let number = |v: &Value| v.as_u64().expect("a number");
    let all = json["changed"].as_array().expect("a list");
    let all = all.iter().map(|s| (number(&s["start"]), number(&s["length"]))).collect();
    (json["exact"].as_bool().expect("exact"), all)
}

/// Brings a backup up to date by a log.
fn back_up(image: &Path, backup: &Path, stretches: &[(u64, u64)]) {
    let from = std::fs::File::open(image).expect("the image");
    let to = std::fs::File::options().write(true).open(backup).expect("the backup");
    for (start, len) in stretches {
        let mut bytes = vec![0; *len as usize];
        from.read_exact_at(&mut bytes, *start).expect("read");
        to.write_all_at(&bytes, *start).expect("write");
    }
}

const SIZE: u64 = 64 << 20;

#[test]
fn a_backup_by_the_log_equals_the_disk_also_after_a_kill() {
    let folder = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).expect("a folder");
    let at = folder.path();
    let [image, backup, first, second, control] =
        ["image", "backup", "first.log", "second.log", "control"].map(|name| at.join(name));
    let numbers: Vec<u8> = (0..SIZE / 8).flat_map(u64::to_le_bytes).collect();
    std::fs::write(&image, &numbers).expect("an image");
    std::fs::copy(&image, &backup).expect("a full backup");
    let args = [text(&image), "--control", text(&control), "--changed-log", text(&first)];
    let server = Server::start(at, &args);
    let writes = |offset: &str| {
        let fixed = ["--rw=randwrite", "--bsrange=4k-64k", "--iodepth=16", "--runtime=2"];
        fio(at, "", &[&fixed[..], &["--size=8M", "--randseed=5", offset]].concat())
    };
    rates(&mut writes("--offset=0"));
    // The log is replaced while somebody writes.
    let busy = writes("--offset=16M").stdout(Stdio::null()).spawn().expect("fio");
    sleep(Duration::from_millis(500));
    ringback(&["changed-log", "start", text(&control), text(&second)]);
    let mut busy = busy;
    assert!(busy.wait().expect("an end").success());
    let (exact, stretches) = shown(&first);
    assert!(exact && !stretches.is_empty() && stretches.iter().all(|(s, l)| s + l <= 24 << 20));
    back_up(&image, &backup, &stretches);
    // kill -9 in the middle of writes.
    let mut busy = writes("--offset=40M").stdout(Stdio::null()).stderr(Stdio::null()).spawn();
    let busy = busy.as_mut().expect("fio");
    sleep(Duration::from_millis(700));
    drop(server);
    let _ = busy.wait();
    let (exact, stretches) = shown(&second);
    assert!(!exact, "it was not closed");
    let changed: u64 = stretches.iter().map(|(_, len)| len).sum();
    assert!(changed > 1 << 20 && changed < SIZE * 2 / 3, "{changed} bytes are claimed");
    back_up(&image, &backup, &stretches);
    let (disk, copy) = (std::fs::read(&image).expect("image"), std::fs::read(&backup).expect("it"));
    assert!(disk != numbers, "something was written");
    let differs = disk.iter().zip(&copy).position(|(a, b)| a != b);
    assert_eq!(differs, None, "a change that the log does not have");
    // NBD clients see the log as a bitmap.
    let server = Server::start(at, &["-r", "--changed-log", text(&second), text(&image)]);
    let uri = format!("nbd+unix:///?socket={}", text(&at.join("sock")));
    let map = well("nbdinfo", &["--map=qemu:dirty-bitmap:second", "--json", &uri]);
    let map: Value = serde_json::from_str(&map).expect("JSON");
    let dirty = map.as_array().expect("a list").iter().filter(|e| e["type"] == 1);
    let dirty = dirty.map(|e| (e["offset"].as_u64(), e["length"].as_u64()));
    let wanted = stretches.iter().map(|(s, l)| (Some(*s), Some(*l)));
    assert_eq!(dirty.collect::<Vec<_>>(), wanted.collect::<Vec<_>>());
    server.end();
}

#[test]
fn a_mirror_has_what_the_image_has_and_faults_and_delays_strike() {
    let folder = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).expect("a folder");
    let at = folder.path();
    let [image, second] = ["image", "second"].map(|name| at.join(name));
    for path in [&image, &second] {
        std::fs::File::create(path).expect("a file").set_len(8 << 20).expect("its size");
    }
    let uri = format!("nbd+unix:///?socket={}", text(&at.join("sock")));
    let io = |what: &str| {
        let output = command("qemu-io", &["-f", "raw", "-c", what, &uri]).output();
        output.expect("qemu-io: install qemu-utils").status.success()
    };
    let mirror = format!("raw:{}", text(&second));
    let server = Server::start(at, &["--mirror", &mirror, text(&image)]);
    assert!(io("write -P 7 1M 3M") && io("write -z 2M 64k"));
    server.end();
    let bytes = std::fs::read(&image).expect("the image");
    assert!(bytes[1 << 20] == 7 && bytes[2 << 20] == 0);
    assert!(bytes == std::fs::read(&second).expect("the mirror"));
    // A mirror that fails is given up, and the image goes on.
    let small = at.join("small");
    std::fs::File::create(&small).expect("a file").set_len(4 << 20).expect("its size");
    let refusal = command(env!("CARGO_BIN_EXE_ringback"), &["export", "nbd", "-k", "x"])
        .args(["--mirror", &format!("raw:{}", text(&small)), text(&image)])
        .output()
        .expect("ringback");
    let refusal = String::from_utf8_lossy(&refusal.stderr).into_owned();
    assert!(refusal.contains("the second disk is smaller"), "{refusal}");
    let fault = "write:ENOSPC:at=4M-5M+read:EIO:nth=2";
    let server = Server::start(at, &["--fault", fault, "--delay-us", "60000", text(&image)]);
    let begin = std::time::Instant::now();
    assert!(io("write 0 4k"));
    assert!(begin.elapsed() >= Duration::from_millis(60), "{:?}", begin.elapsed());
    assert!(!io("write 4M 4k") && io("write 5M 4k"));
    assert_eq!([io("read 0 4k"), io("read 0 4k"), io("read 0 4k")], [true, false, true]);
    server.end();
}

#[test]
fn an_export_stops_at_errors_and_is_resumed() {
    let folder = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).expect("a folder");
    let (image, control) = (folder.path().join("disk"), folder.path().join("control"));
    std::fs::File::create(&image).and_then(|f| f.set_len(1 << 20)).expect("an image");
    let stopping = ["--on-enospc", "pause", "--fault", "write:ENOSPC:nth=1+write:ENOSPC:nth=3"];
    let image = ["-f", "raw", text(&image)];
    let args = [&["--control", text(&control)][..], &stopping, &image].concat();
    let server = Server::start(folder.path(), &args);
    let uri = format!("nbd+unix:///?socket={}", text(&folder.path().join("sock")));
    let write = || {
        let args = ["-f", "raw", "-c", "write -P 7 0 64k", "-c", "read -P 7 0 64k", &uri];
        command("qemu-io", &args).stdout(Stdio::null()).stderr(Stdio::null()).spawn()
    };
    let told = || ringback(&["disk", "job", "--live", text(&control)]);
    let until_stopped = || {
        for _ in 0..200 {
            if told().contains("paused by an error: No space left on device") {
                return;
            }
            sleep(Duration::from_millis(50));
        }
        panic!("it does not stop: {}", told());
    };
    let mut writer = write().expect("qemu-io: install qemu-utils");
    until_stopped();
    assert!(writer.try_wait().expect("its state").is_none(), "an error in spite of all");
    ringback(&["disk", "resume", "--live", text(&control)]);
    assert!(writer.wait().expect("its end").success());
    assert!(!told().contains("paused"), "{}", told());
    // Ended while it stands: what waits is tried once more.
    let mut writer = write().expect("qemu-io");
    until_stopped();
    server.end();
    let _ = writer.wait();
    let refused = command(
        env!("CARGO_BIN_EXE_ringback"),
        &[&["export", "nbd", "-k", "x", "--on-enospc", "pause"][..], &image].concat(),
    );
    let refused = { refused }.output().expect("ringback");
    assert!(String::from_utf8_lossy(&refused.stderr).contains("--control"));
}
