//! A backend's device and a toolstack that writes at the worst moment.

use std::path::Path;
use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;

use crossbeam::channel::{Receiver, Sender, bounded, unbounded};
use hypervisor::core::domains::Kind;
use hypervisor::embedded::{Backend, Toolstack};
use hypervisor::store::{Client, Tx, Watched};
use hypervisor::xenbus::{
    self, Device, DeviceId, Fault, Faults, Key, Meeting, Nodes, Nodesets, Options, Parting, Scope,
};

use crate::agent::{Rig, until};

const DEVID: u32 = 3;

/// What a device is asked to do, in order; and where it stops in `connect` until it may go on.
struct Scripted {
    calls: Sender<&'static str>,
    go_on: Receiver<()>,
}

impl Device for Scripted {
    fn advertise(&mut self, _: &Nodes) -> Result<Vec<Key>, Fault> {
        Ok(vec![("feature-a".to_owned(), "1".to_owned()), ("feature-b".to_owned(), "2".to_owned())])
    }
    fn connect(&mut self, _: &Nodes, _: Meeting, _: Faults) -> Result<Vec<Key>, Fault> {
        self.calls.send("connect")?;
        self.go_on.recv()?;
        Ok(vec![("sectors".to_owned(), "8".to_owned())])
    }
    fn disconnect(&mut self, _: Parting) {
        let _ = self.calls.send("disconnect");
    }
    fn release(&mut self) {}
    fn tick(&mut self, _: &Nodes) -> Result<(), Fault> {
        Ok(())
    }
    fn control(&mut self, _: &Nodes, _: &str) -> String {
        String::new()
    }
}

struct Kinds(Mutex<Option<Scripted>>);

impl xenbus::Backend for Kinds {
    fn kind(&self) -> &'static str {
        "vbd"
    }
    fn script(&self) -> &'static str {
        "block-scripted"
    }
    fn device(&self, _: &DeviceId) -> Box<dyn Device> {
        Box::new(self.0.lock().unwrap().take().expect("one device"))
    }
}

/// A served device of a guest without processes.
struct Served {
    store: Client,
    back: String,
    front: String,
    calls: Receiver<&'static str>,
    go_on: Sender<()>,
    stop: Option<Sender<()>>,
    thread: Option<JoinHandle<()>>,
    /// The domain lasts as long as whoever made it is connected.
    _toolstack: Toolstack,
    rig: Rig,
}

fn serve(socket: &Path, run_dir: &Path, device: Scripted, stop: Receiver<()>) -> JoinHandle<()> {
    let hypervisor = Arc::new(Backend::connect(socket).unwrap());
    let options = Options { scope: Scope::All, nodes: Nodesets::Any, run_dir: run_dir.to_owned() };
    let kinds = Kinds(Mutex::new(Some(device)));
    std::thread::spawn(move || xenbus::serve(&*hypervisor, &kinds, &options, &stop).unwrap())
}

impl Served {
    fn start() -> Served {
        let rig = Rig::start();
        let (calls_in, calls) = unbounded();
        let (go_on, may_go_on) = unbounded();
        let (stop, stopped) = bounded(1);
        let device = Scripted { calls: calls_in, go_on: may_go_on };
        let thread = serve(&rig.socket(), &rig.run_dir(), device, stopped);
        let toolstack = rig.toolstack();
        let store = toolstack.store().unwrap();
        let domid = toolstack.create_domain(None, Kind::Guest, "guest").unwrap();
        let back = format!("/local/domain/0/backend/vbd/{domid}/{DEVID}");
        let front = format!("/local/domain/{domid}/device/vbd/{DEVID}");
        let (stop, thread) = (Some(stop), Some(thread));
        let served =
            Served { store, back, front, calls, go_on, stop, thread, _toolstack: toolstack, rig };
        served.store.watch(&served.back, "back").unwrap();
        let device = xenbus::toolstack::Device {
            id: DeviceId { kind: "vbd", domid, devid: DEVID },
            backend: 0,
            backend_keys: Vec::new(),
            frontend_keys: Vec::new(),
        };
        xenbus::toolstack::attach(&served.store, &device).unwrap();
        served
    }
    fn back(&self, key: &str) -> Option<String> {
        self.store.get(&format!("{}/{key}", self.back)).unwrap()
    }
    fn set(&self, directory: &str, key: &str, value: &str) {
        self.store.write(Tx::NONE, &format!("{directory}/{key}"), value).unwrap();
    }
    fn reaches(&self, state: &str) {
        until("the backend's state", || self.back("state").as_deref() == Some(state));
    }
    /// Removes both directories and makes them again, in one transaction.
    fn make_anew(&self) {
        let domid = self.front.split('/').nth(3).unwrap_or_default();
        let directories = [
            (&self.back, "frontend", &self.front, domid),
            (&self.front, "backend", &self.back, "0"),
        ];
        let made = self.store.transaction(|tx| {
            for (directory, other, path, other_id) in directories {
                self.store.remove(tx, directory)?;
                let id = format!("{other}-id");
                let keys =
                    [(other, path.as_str()), (&id, other_id), ("online", "1"), ("state", "1")];
                for (key, value) in keys {
                    self.store.write(tx, &format!("{directory}/{key}"), value)?;
                }
            }
            Ok(())
        });
        made.unwrap();
    }
    /// Connected, but for the answer of `connect`.
    fn connecting(&self) {
        self.reaches("2");
        self.set(&self.front, "state", "3");
        assert_eq!(self.calls.recv(), Ok("connect"));
    }
}

impl Drop for Served {
    fn drop(&mut self) {
        self.stop = None;
        let _ = self.go_on.send(());
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
        assert!(self.rig.stop(), "the hypervisor");
    }
}

#[test]
fn keys_come_with_the_state_they_are_said_for() {
    let served = Served::start();
    // One transaction: whoever is told of the first key finds the others and the state.
    let mut told = false;
    until("the keys", || {
        let named = |event: &Watched| match event {
            Watched::Path { path, .. } => path.ends_with("/feature-a"),
            _ => false,
        };
        if !told && served.store.inbox().take().iter().any(named) {
            told = true;
            assert_eq!(served.back("state").as_deref(), Some("2"));
            assert_eq!(served.back("feature-b").as_deref(), Some("2"));
        }
        told
    });
    served.connecting();
    assert_eq!((served.back("sectors"), served.back("state").as_deref()), (None, Some("2")));
    served.go_on.send(()).unwrap();
    served.reaches("4");
    assert_eq!(served.back("sectors").as_deref(), Some("8"));
}

#[test]
fn a_toolstack_that_asks_to_close_while_we_connect_is_heard() {
    let served = Served::start();
    served.connecting();
    served.set(&served.back, "online", "0");
    served.set(&served.back, "state", "5");
    served.store.inbox().take();
    served.go_on.send(()).unwrap();
    until("the keys", || served.back("sectors").is_some());
    assert_eq!(served.back("state").as_deref(), Some("5"), "it was not answered with less");
    // The frontend sees 5 and closes.
    served.set(&served.front, "state", "6");
    served.reaches("6");
    assert_eq!(served.calls.try_iter().collect::<Vec<_>>(), ["disconnect"]);
}

#[test]
fn a_directory_made_anew_while_we_wait_is_advertised_in() {
    let served = Served::start();
    served.reaches("2");
    served.make_anew();
    served.reaches("2");
    assert_eq!(served.back("feature-b").as_deref(), Some("2"));
    served.connecting();
    served.go_on.send(()).unwrap();
    served.reaches("4");
}

#[test]
fn a_directory_made_anew_while_we_connect_is_not_told_of_the_old_device() {
    let served = Served::start();
    served.connecting();
    served.make_anew();
    served.go_on.send(()).unwrap();
    served.reaches("2");
    assert_eq!(served.back("sectors"), None, "of the disk that was opened for the old one");
    assert_eq!(served.calls.try_iter().collect::<Vec<_>>(), ["disconnect"]);
    // The new one's frontend connects.
    served.connecting();
    served.go_on.send(()).unwrap();
    served.reaches("4");
    assert_eq!(served.back("sectors").as_deref(), Some("8"));
}
