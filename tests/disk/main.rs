//! `ringback disk` beside qemu-img: the same answers, the same bytes.

mod chains;
mod convert;
mod halfway;
mod inside;
mod interrupt;
mod locks;
mod look;
mod make;

use std::fs;
use std::path::PathBuf;
use std::process::{Command, Output, Stdio};

use serde_json::Value;

/// A folder with images, in which commands run.
struct Place {
    dir: tempfile::TempDir,
}

/// What a command that ended has said.
#[derive(Debug)]
struct Said {
    code: i32,
    out: String,
    err: String,
}

impl Said {
    fn of(output: Output) -> Said {
        let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
        Said {
            code: output.status.code().unwrap_or(-1),
            out: text(&output.stdout),
            err: text(&output.stderr),
        }
    }
    fn json(&self) -> Value {
        serde_json::from_str(&self.out).unwrap_or_else(|e| panic!("{e}: {self:?}"))
    }
}

impl Place {
    fn new() -> Place {
        Place { dir: tempfile::tempdir().expect("a folder") }
    }
    fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }
    fn command(&self, args: &[&str]) -> Command {
        let mut command = Command::new(env!("CARGO_BIN_EXE_ringback"));
        command.current_dir(self.dir.path()).arg("disk").args(args).stdin(Stdio::null());
        command
    }
    /// `ringback disk ARGS`.
    fn disk(&self, args: &[&str]) -> Said {
        Said::of(self.command(args).output().expect("ringback"))
    }
    /// The same, which must succeed.
    fn ok(&self, args: &[&str]) -> Said {
        let said = self.disk(args);
        assert_eq!(said.code, 0, "{args:?}: {said:?}");
        said
    }
    fn tool(&self, tool: &str, args: &[&str]) -> Said {
        let mut command = Command::new(tool);
        command.current_dir(self.dir.path()).args(args).stdin(Stdio::null());
        let output = command.output();
        Said::of(output.unwrap_or_else(|e| panic!("{tool} (package qemu-utils): {e}")))
    }
    fn qemu_img(&self, args: &[&str]) -> Said {
        let said = self.tool("qemu-img", args);
        assert_eq!(said.code, 0, "qemu-img {args:?}: {said:?}");
        said
    }
    /// Carries out commands of qemu-io on an image.
    fn qemu_io(&self, format: &str, file: &str, commands: &[&str]) {
        let mut args = vec!["-f", format];
        commands.iter().for_each(|c| args.extend(["-c", *c]));
        args.push(file);
        let said = self.tool("qemu-io", &args);
        assert!(said.code == 0 && !said.out.contains("failed"), "qemu-io {args:?}: {said:?}");
    }
    /// Whether qemu-img finds the same bytes in both.
    fn assert_same(&self, (a, format_a): (&str, &str), (b, format_b): (&str, &str)) {
        let said = self.tool("qemu-img", &["compare", "-f", format_a, "-F", format_b, a, b]);
        assert_eq!(said.code, 0, "{a} and {b}: {said:?}");
    }
    fn assert_checked(&self, file: &str, format: &str) {
        self.qemu_img(&["check", "-q", "-f", format, file]);
    }

    /// A raw image with data and holes, whose size is no multiple of 64 KiB.
    fn sample(&self, name: &str) -> Vec<u8> {
        let mut bytes = vec![0; (9 << 20) + 3 * 512];
        let mut put = |at: usize, len: usize, seed: u32| {
            let mut n = seed;
            bytes[at..at + len].iter_mut().for_each(|b| {
                // Compresses, but not to nothing.
                n = n.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
                *b = (n >> 28) as u8 + 1;
            });
        };
        put(0, 512, 1);
        put(65536, 200_000, 2);
        put((3 << 20) - 4096, 8192, 3);
        put(5 << 20, 2 << 20, 4);
        put((9 << 20) + 1024, 512, 5);
        let file = fs::File::create(self.path(name)).expect("a file");
        file.set_len(bytes.len() as u64).expect("a size");
        for (n, piece) in bytes.chunks(4096).enumerate() {
            if piece.iter().any(|b| *b != 0) {
                use std::os::unix::fs::FileExt;
                file.write_all_at(piece, n as u64 * 4096).expect("write");
            }
        }
        // So that the space it takes is known.
        file.sync_all().expect("sync");
        bytes
    }
    fn bytes(&self, name: &str) -> Vec<u8> {
        fs::read(self.path(name)).expect(name)
    }
}
