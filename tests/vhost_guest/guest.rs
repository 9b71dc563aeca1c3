//! A guest of QEMU (TCG), with Debian's kernel, that carries out commands.

use std::io::{BufRead, BufReader, Write};
use std::path::Path;
use std::process::{Child, ChildStdin, Command, Stdio};
use std::sync::mpsc::{Receiver, RecvTimeoutError, channel};
use std::time::{Duration, Instant};

/// How long the guest may take to start, or for a command.
const PATIENCE: Duration = Duration::from_secs(120);

/// A running guest; it ends with this value.
pub struct Guest {
    qemu: Child,
    input: ChildStdin,
    lines: Receiver<String>,
    number: u32,
    log: Vec<String>,
}

/// What a command has said, and its status.
pub struct Answer {
    pub text: String,
    pub status: i32,
}

impl Guest {
    /// Boots, with the vhost-user device `options` at `socket`.
    pub fn boot(socket: &Path, options: &str) -> Guest {
        let build = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/vhost_guest/build");
        let place = Path::new(env!("CARGO_TARGET_TMPDIR")).join("vhost_guest");
        std::fs::create_dir_all(&place).expect("a folder");
        let built = Command::new(build).arg(&place).status().expect("bash");
        assert!(built.success(), "no initramfs: tests/lab/setup unit installs what it needs");
        let chardev = format!("socket,id=c,path={},reconnect=1", socket.display());
        let mut command = Command::new("qemu-system-x86_64");
        command.args(["-machine", "q35,accel=tcg,memory-backend=m", "-m", "512", "-smp", "2"]);
        command.args(["-object", "memory-backend-memfd,id=m,size=512M,share=on", "-cpu", "max"]);
        command.args(["-nodefaults", "-no-user-config", "-display", "none", "-no-reboot"]);
        command.args(["-serial", "stdio", "-append", "console=ttyS0 quiet panic=-1"]);
        command.arg("-kernel").arg(place.join("vmlinuz"));
        command.arg("-initrd").arg(place.join("initramfs"));
        command.args(["-chardev", &chardev, "-device"]);
        command.arg(format!("vhost-user-blk-pci,chardev=c,{options}"));
        let qemu = command.stdin(Stdio::piped()).stdout(Stdio::piped()).spawn();
        let mut qemu = qemu.unwrap_or_else(|e| panic!("qemu-system-x86_64: {e}: install it"));
        let input = qemu.stdin.take().expect("its input");
        let output = qemu.stdout.take().expect("its output");
        let (send, lines) = channel();
        std::thread::spawn(move || {
            for line in BufReader::new(output).split(b'\n').map_while(Result::ok) {
                let line = String::from_utf8_lossy(&line).trim_end().to_owned();
                if send.send(line).is_err() {
                    break;
                }
            }
        });
        let mut guest = Guest { qemu, input, lines, number: 0, log: Vec::new() };
        guest.until("@ready@ ");
        guest
    }

    /// Lines up to one that begins so; what that one says more.
    fn until(&mut self, mark: &str) -> (Vec<String>, String) {
        let end = Instant::now() + PATIENCE;
        let mut lines = Vec::new();
        loop {
            let left = end.saturating_duration_since(Instant::now());
            match self.lines.recv_timeout(left) {
                Ok(line) => {
                    self.log.push(line.clone());
                    if let Some(rest) = line.strip_prefix(mark) {
                        return (lines, rest.to_owned());
                    }
                    lines.push(line);
                }
                Err(RecvTimeoutError::Timeout) => {
                    panic!("no {mark:?} within {PATIENCE:?}:\n{}", self.log.join("\n"))
                }
                Err(RecvTimeoutError::Disconnected) => {
                    panic!("the guest has ended before {mark:?}:\n{}", self.log.join("\n"))
                }
            }
        }
    }

    /// Has a command begun; [`finish`](Self::finish) waits for it.
    pub fn begin(&mut self, command: &str) {
        self.number += 1;
        writeln!(self.input, "{} {command}", self.number).expect("the guest reads");
    }

    /// Waits for the command that was begun last.
    pub fn finish(&mut self) -> Answer {
        let number = self.number;
        self.until(&format!("@{number}<"));
        let (lines, status) = self.until(&format!("@{number}@ "));
        Answer { text: lines.join("\n"), status: status.parse().expect("a status") }
    }

    /// Runs a command, which must go well: what it has said.
    pub fn run(&mut self, command: &str) -> String {
        self.begin(command);
        let answer = self.finish();
        assert_eq!(answer.status, 0, "{command}:\n{}", answer.text);
        answer.text.trim().to_owned()
    }

    /// What the kernel said of errors of disks.
    pub fn errors(&mut self) -> String {
        self.run("dmesg | grep -iE 'i/o error|blk_update|buffer i/o|ext4-fs error' || true")
    }
}

impl Drop for Guest {
    fn drop(&mut self) {
        let _ = self.qemu.kill();
        let _ = self.qemu.wait();
    }
}
