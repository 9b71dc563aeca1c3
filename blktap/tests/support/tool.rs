//! QEMU's programs on images that this process had open.
use std::process::{Command, Output};
use std::time::{Duration, Instant};

/// How long an image may seem locked that was closed.
const PATIENCE: Duration = Duration::from_secs(10);

/// Runs a program of Debian's qemu-utils. An image that was closed here a moment ago may seem
/// locked: while another thread starts a program, its child has all that was open between fork
/// and exec. A lock that stays is in the output.
pub fn run(command: &mut Command) -> Output {
    let end = Instant::now() + PATIENCE;
    loop {
        let output = command.output();
        let output = output.unwrap_or_else(|e| panic!("{command:?} (Debian: qemu-utils): {e}"));
        let locked = String::from_utf8_lossy(&output.stderr).contains("Is another process using");
        if output.status.success() || !locked || Instant::now() > end {
            return output;
        }
        std::thread::sleep(Duration::from_millis(20));
    }
}
