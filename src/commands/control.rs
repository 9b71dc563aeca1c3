//! A control socket: one JSON object a line, one object a line in answer.

use std::io::{BufRead, BufReader, Read, Write};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use parking_lot::Mutex;
use serde_json::{Value, json};

use super::Result;

/// Longest line that is read.
const MAX_LINE: u64 = 64 << 10;
/// How long somebody may keep the socket without saying anything.
const PATIENCE: Duration = Duration::from_secs(10);

/// What answers a request; an error's text becomes `{"error": TEXT}`.
pub type Answer = dyn Fn(Value) -> Result<Value> + Send + Sync;

/// A socket that is served until this is dropped, which removes it.
pub struct Control {
    path: PathBuf,
    /// Held while a request is carried out and answered.
    busy: Arc<Mutex<()>>,
}

impl Control {
    /// Serves `path`, whose folder is made if need be, for this user alone. What a killed
    /// predecessor left is replaced.
    pub fn serve(path: &Path, answer: Arc<Answer>) -> Result<Control> {
        if UnixStream::connect(path).is_ok() {
            return Err(format!("{}: somebody serves it", path.display()).into());
        }
        if let Some(folder) = path.parent() {
            std::fs::create_dir_all(folder).map_err(|e| format!("{}: {e}", folder.display()))?;
        }
        let _ = std::fs::remove_file(path);
        let named = |e: std::io::Error| format!("{}: {e}", path.display());
        let listener = UnixListener::bind(path).map_err(named)?;
        let only_me = std::os::unix::fs::PermissionsExt::from_mode(0o600);
        std::fs::set_permissions(path, only_me).map_err(named)?;
        let busy = Arc::new(Mutex::new(()));
        let held = Arc::clone(&busy);
        std::thread::Builder::new().name("control".into()).spawn(move || {
            for stream in listener.incoming() {
                let told = stream.and_then(|stream| converse(&stream, &*answer, &held));
                if let Err(e) = told {
                    tracing::debug!("control: {e}");
                }
            }
        })?;
        Ok(Control { path: path.to_owned(), busy })
    }
}

impl Drop for Control {
    fn drop(&mut self) {
        // Who asked for the end gets its answer.
        let _quiet = self.busy.lock();
        let _ = std::fs::remove_file(&self.path);
    }
}

/// One after the other: what is asked for takes a moment, and changes the same things.
fn converse(mut stream: &UnixStream, answer: &Answer, busy: &Mutex<()>) -> std::io::Result<()> {
    stream.set_read_timeout(Some(PATIENCE))?;
    stream.set_write_timeout(Some(PATIENCE))?;
    let mut reader = BufReader::new(stream);
    loop {
        let mut line = String::new();
        if reader.by_ref().take(MAX_LINE).read_line(&mut line)? == 0 {
            return Ok(());
        }
        let _busy = busy.lock();
        let parsed: Result<Value> = serde_json::from_str(&line).map_err(Into::into);
        let told = parsed.and_then(answer);
        let told = told.unwrap_or_else(|e| json!({"error": e.to_string()}));
        stream.write_all(format!("{told}\n").as_bytes())?;
    }
}

/// Asks the one behind a socket; its answer is an object without `error`.
pub fn ask(path: &Path, patience: Duration, request: &Value) -> Result<Value> {
    let mut stream = UnixStream::connect(path)
        .map_err(|e| format!("nobody serves it at {}: {e}", path.display()))?;
    stream.set_read_timeout(Some(patience))?;
    stream.write_all(format!("{request}\n").as_bytes())?;
    let mut line = String::new();
    BufReader::new(stream).read_line(&mut line)?;
    let answer: Value = serde_json::from_str(&line).map_err(|_| "no answer")?;
    match answer.get("error").and_then(Value::as_str) {
        Some(error) => Err(error.into()),
        None => Ok(answer),
    }
}
