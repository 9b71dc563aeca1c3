//! SIGTERM and Ctrl-C: the first asks to drain and end, the second ends at once.

use crossbeam::channel::{Receiver, bounded};
use tokio::signal::unix::{SignalKind, signal};

/// A channel that gets a message at the first signal.
pub fn stop() -> std::io::Result<Receiver<()>> {
    let (send, receive) = bounded(1);
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    let (mut term, mut int) = runtime.block_on(async {
        std::io::Result::Ok((signal(SignalKind::terminate())?, signal(SignalKind::interrupt())?))
    })?;
    std::thread::Builder::new().name("signals".into()).spawn(move || {
        runtime.block_on(async {
            for round in 0.. {
                tokio::select! {
                    _ = term.recv() => {}
                    _ = int.recv() => {}
                }
                if round > 0 {
                    std::process::exit(130);
                }
                // Who no longer listens has done its work and is about to say how it went.
                if send.try_send(()).is_ok() {
                    tracing::info!("ending; a second signal ends at once");
                }
            }
        });
    })?;
    Ok(receive)
}
