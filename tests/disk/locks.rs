//! What is served cannot be written by anybody else, by whatever command: neither the image nor
//! what it builds on. And what QEMU has open is refused by us.

use std::io::{BufRead, BufReader};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use rustix::process::{Pid, Signal, kill_process};

use super::{Place, Said};

const SIZE: &str = "4M";

/// The images of a format: `image.EXT`, which builds on `base.EXT` where the format can, as does
/// `other.EXT`; and `small.raw`.
struct Family {
    format: &'static str,
    /// QEMU's name of the format.
    qemu: &'static str,
}

const FAMILIES: [Family; 3] = [
    Family { format: "raw", qemu: "raw" },
    Family { format: "qcow2", qemu: "qcow2" },
    Family { format: "vhd", qemu: "vpc" },
];

impl Family {
    fn make(&self) -> Place {
        let place = Place::new();
        let f = self.format;
        place.sample("source.raw");
        let (image, base, other) = (self.name("image"), self.name("base"), self.name("other"));
        if f == "raw" {
            place.ok(&["create", "-f", f, &image, SIZE]);
            return place;
        }
        place.ok(&["create", "-f", f, &base, SIZE]);
        if f == "qcow2" {
            self.furnish(&place, &base);
        }
        for name in [&image, &other] {
            place.ok(&["create", "-f", f, "-b", &base, "-F", f, name]);
        }
        if f == "qcow2" {
            self.furnish(&place, &image);
            place.qemu_io(f, &other, &["write -P 3 0 64k"]);
        }
        place
    }
    /// With what commands can remove.
    fn furnish(&self, place: &Place, name: &str) {
        place.ok(&["snapshot", "create", name, "s"]);
        place.ok(&["bitmap", "add", "--disabled", name, "b"]);
    }
    fn name(&self, stem: &str) -> String {
        format!("{stem}.{}", self.format)
    }

    /// Every command of ours that would write the image, by words; `@` is the image.
    fn ours(&self) -> Vec<String> {
        let f = self.format;
        let mut all = vec![
            format!("resize -f {f} @ +1M"),
            format!("resize --shrink -f {f} @ 1M"),
            format!("convert -O {f} source.raw @"),
            format!("convert -n -O {f} small.raw @"),
            format!("create -f {f} @ 1M"),
        ];
        if f == "vhd" {
            // The only one that does not become smaller, whoever has it.
            all.remove(1);
        }
        if f != "raw" {
            all.push(format!("check -r all -f {f} @"));
            all.push(format!("check --repair=leaks -f {f} @"));
        }
        if f == "qcow2" {
            for words in [
                "rebase -b small.raw -F raw @",
                "rebase -u -b small.raw -F raw @",
                "snapshot create @ t",
                "snapshot apply @ s",
                "snapshot delete @ s",
                "bitmap add @ c",
                "bitmap remove @ b",
                "bitmap enable @ b",
                "bitmap disable @ b",
                "bitmap clear @ b",
            ] {
                all.push(words.into());
            }
            all.push("convert -c -O qcow2 source.raw @".into());
        }
        all
    }

    /// Every command of QEMU's tools that would write the image.
    fn theirs(&self) -> Vec<String> {
        let f = self.qemu;
        let mut all = vec![
            format!("qemu-img resize -f {f} @ +1M"),
            format!("qemu-img create -f {f} @ 1M"),
            format!("qemu-img convert -f raw -O {f} source.raw @"),
            format!("qemu-img convert -n -f raw -O {f} small.raw @"),
            format!("qemu-io -f {f} -c write_0_512 @"),
            format!("qemu-io -f {f} -c discard_0_512 @"),
        ];
        if f != "raw" {
            // Whoever takes it for another format is refused as well.
            all.push("qemu-io -f raw -c write_0_512 @".into());
        }
        if f == "qcow2" {
            for words in [
                "qemu-img snapshot -c t @",
                "qemu-img snapshot -a s @",
                "qemu-img snapshot -d s @",
                "qemu-img rebase -f qcow2 -b small.raw -F raw @",
                "qemu-img rebase -u -f qcow2 -b small.raw -F raw @",
                "qemu-img bitmap --add @ c",
                "qemu-img bitmap --remove @ b",
                "qemu-img check -f qcow2 -r all @",
                "qemu-img amend -f qcow2 -o lazy_refcounts=on @",
            ] {
                all.push(words.into());
            }
        }
        all
    }

    /// Those that write what an image builds on.
    fn writing_base(&self) -> (Vec<&'static str>, Vec<&'static str>) {
        match self.format {
            "qcow2" => (
                vec!["commit other.qcow2", "commit -d other.qcow2", "commit image.qcow2"],
                vec![
                    "qemu-img commit -f qcow2 other.qcow2",
                    "qemu-img commit -f qcow2 image.qcow2",
                ],
            ),
            "vhd" => (vec!["commit -d other.vhd", "commit -d image.vhd"], vec![]),
            _ => (vec![], vec![]),
        }
    }
}

/// The words of a command on `image`; `_` in a word is a space.
fn words(line: &str, image: &str) -> Vec<String> {
    line.split(' ').map(|w| if w == "@" { image.into() } else { w.replace('_', " ") }).collect()
}

fn ours(place: &Place, line: &str, image: &str) -> Said {
    let words = words(line, image);
    place.disk(&words.iter().map(String::as_str).collect::<Vec<_>>())
}

fn theirs(place: &Place, line: &str, image: &str) -> Said {
    let words = words(line, image);
    let words: Vec<&str> = words.iter().map(String::as_str).collect();
    place.tool(words[0], &words[1..])
}

/// A process that has an image open; it is there once it has been started.
struct Holder(Child);

impl Holder {
    /// Waits for the first line that the command says.
    fn start(command: &mut Command) -> Holder {
        let mut child = command.stdin(Stdio::null()).stdout(Stdio::piped()).spawn().expect("it");
        let mut line = String::new();
        let out = child.stdout.take().expect("its output");
        BufReader::new(out).read_line(&mut line).expect("a line");
        assert!(!line.is_empty(), "{command:?} has ended");
        Holder(child)
    }
    /// `ringback export nbd`.
    fn export(place: &Place, format: &str, image: &str) -> Holder {
        Holder::start(second_export(place, "sock", format, image).env("RINGBACK_LOG", "warn"))
    }
    /// A backend of `ringback run`, with a guest.
    fn backend(place: &Place, format: &str, image: &str) -> Holder {
        let mut command = ringback(place);
        let disk = format!("{format}:{image}");
        command.args(["run", "--nbd", "sock", "--overwrite", "--disk", &disk]);
        Holder::start(&mut command)
    }
    /// QEMU's storage daemon, which could write.
    fn qemu(place: &Place, format: &str, image: &str) -> Holder {
        let mut command = Command::new("qemu-storage-daemon");
        command.current_dir(place.dir.path()).stdin(Stdio::null());
        command.args(["--blockdev", &format!("file,node-name=file,filename={image}")]);
        command.args(["--blockdev", &format!("{format},node-name=disk,file=file")]);
        command.args(["--nbd-server", "addr.type=unix,addr.path=theirs"]);
        command.args(["--export", "nbd,id=e,node-name=disk,name=,writable=on"]);
        let child = command.spawn();
        let child = child.unwrap_or_else(|e| panic!("qemu-storage-daemon (package of it): {e}"));
        let holder = Holder(child);
        let end = Instant::now() + Duration::from_secs(20);
        while std::os::unix::net::UnixStream::connect(place.path("theirs")).is_err() {
            assert!(Instant::now() < end, "qemu-storage-daemon does not listen");
            std::thread::sleep(Duration::from_millis(5));
        }
        holder
    }
    fn end(mut self) {
        kill_process(Pid::from_child(&self.0), Signal::TERM).expect("SIGTERM");
        let status = self.0.wait().expect("an end");
        assert!(status.success(), "{status}");
    }
}

impl Drop for Holder {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

fn ringback(place: &Place) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_ringback"));
    command.current_dir(place.dir.path()).stdin(Stdio::null());
    command
}

fn second_export(place: &Place, socket: &str, format: &str, image: &str) -> Command {
    let mut command = ringback(place);
    command.args(["export", "nbd", "-k", socket, "-f", format, image]);
    command
}

/// Refused because of a lock, with what to do about it.
fn assert_ours(said: &Said, what: &str) {
    assert!(said.code != 0, "{what}: it was done: {said:?}");
    let told = said.err.contains("in use by another process")
        && said.err.contains("\" lock)")
        && said.err.contains("stop the other user");
    assert!(told, "{what}: {said:?}");
}

/// Nobody can write `target` of those who are asked, and it stays as it is.
fn assert_locked(place: &Place, family: &Family, target: &str, whose: &str) {
    let before = place.bytes(target);
    // These wait for a predecessor; they do so beside the others.
    let f = family.format;
    let disk = format!("{f}:{target}");
    let mut backend = ringback(place);
    backend.args(["run", "--overwrite", "--disk", &disk]);
    let waiting: Vec<(&str, Child)> =
        [("export", second_export(place, "second", f, target)), ("run", backend)]
            .into_iter()
            .map(|(name, mut command)| {
                command.stdout(Stdio::piped()).stderr(Stdio::piped());
                (name, command.spawn().expect("ringback"))
            })
            .collect();
    for line in family.ours() {
        assert_ours(&ours(place, &line, target), &format!("{whose} {target}: {line}"));
    }
    for (name, child) in waiting {
        let said = Said::of(child.wait_with_output().expect("ringback"));
        assert_ours(&said, &format!("{whose} {target}: {name}"));
    }
    assert!(place.bytes(target) == before, "{whose} {target}: it has changed");
}

fn assert_locked_for_qemu(place: &Place, family: &Family, target: &str, whose: &str) {
    let before = place.bytes(target);
    for line in family.theirs() {
        let said = theirs(place, &line, target);
        let what = format!("{whose} {target}: {line}");
        assert!(said.code != 0, "{what}: it was done: {said:?}");
        assert!(said.err.contains("lock"), "{what}: {said:?}");
    }
    assert!(place.bytes(target) == before, "{whose} {target}: it has changed");
}

/// All formats at once: each waits for most of its time.
fn each_family(test: impl Fn(&Family, &Place) + Sync) {
    std::thread::scope(|scope| {
        for family in &FAMILIES {
            let test = &test;
            scope.spawn(move || {
                let place = family.make();
                place.ok(&["create", "small.raw", "1M"]);
                test(family, &place);
            });
        }
    });
}

/// With somebody who serves `image.EXT`.
fn served_by(hold: fn(&Place, &str, &str) -> Holder, whose: &str) {
    each_family(|family, place| {
        let image = family.name("image");
        let holder = hold(place, family.format, &image);
        assert_locked(place, family, &image, whose);
        assert_locked_for_qemu(place, family, &image, whose);
        if family.format != "raw" {
            let base = family.name("base");
            assert_locked(place, family, &base, whose);
            assert_locked_for_qemu(place, family, &base, whose);
            assert_base_locked(place, family);
        }
        holder.end();
        // Nobody has it any more.
        place.ok(&["resize", "-f", family.format, &image, "+1M"]);
    });
}

/// Nothing is committed into the base: neither the image nor another one.
fn assert_base_locked(place: &Place, family: &Family) {
    let base = family.name("base");
    let before = place.bytes(&base);
    let (of_ours, of_theirs) = family.writing_base();
    for line in of_ours {
        assert_ours(&ours(place, line, ""), line);
    }
    for line in of_theirs {
        let said = theirs(place, line, "");
        assert!(said.code != 0 && said.err.contains("lock"), "{line}: {said:?}");
    }
    assert!(place.bytes(&base) == before, "{base} has changed");
}

#[test]
fn what_an_export_serves_is_locked() {
    served_by(Holder::export, "export");
}

#[test]
fn what_a_backend_serves_is_locked() {
    served_by(Holder::backend, "backend");
}

#[test]
fn what_qemu_has_is_refused() {
    each_family(|family, place| {
        // QEMU does not open differencing images.
        let image = family.name(if family.format == "vhd" { "base" } else { "image" });
        let holder = Holder::qemu(place, family.qemu, &image);
        assert_locked(place, family, &image, "QEMU");
        if family.format == "qcow2" {
            assert_locked(place, family, "base.qcow2", "QEMU");
            assert_base_locked(place, family);
        }
        drop(holder);
        place.ok(&["resize", "-f", family.format, &image, "+1M"]);
    });
}
