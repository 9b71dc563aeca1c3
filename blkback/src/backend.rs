//! A block device as the xenbus server sees it: negotiates, opens the disk, runs the queues.

use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

use blktap::filters::stall::Stall;
use blktap::filters::throttle::{self, Group, Groups};
use blktap::filters::{ChangedDisk, DelayDisk, FaultyDisk, ThrottleDisk};
use blktap::formats::qcow2::L2Cache;
use blktap::image::{self, BackingPolicy, Commits, ImageOptions};
use blktap::live::jobs::{AtTheEnd, Opening};
use blktap::live::{LiveDisk, Name};
use blktap::storage::{Access, Cache, Lock, OpenOptions, Sharing};
use blktap::{Disk, Geometry, NbdDisk, NbdOptions, NbdTarget};
use hypervisor::xenbus::knobs::Knobs;
use hypervisor::xenbus::{
    Backend, Device, DeviceId, Fault, Faults, Key, LogLimit, Meeting, Nodes, Parting, State, Stats,
    inflight,
};
use hypervisor::{DomId, Hypervisor};
use serde_json::{Value, json};

use crate::config::{ChangedLog, Config, GrantMode, Ordering};
use crate::control::{self, Command};
use crate::inflight::tables;
use crate::live::{self, Jobs, Task};
use crate::negotiate::{Accepted, DiskKeys, Offer};
use crate::proto::vdev::Vdev;
use crate::proto::{Features, Limits, Mode};
use crate::queue::{Queue, Start};

/// Name of the hotplug script whose nodes are ours.
pub const SCRIPT: &str = "block-ringback";

/// What a backend's node says about the disk to open.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Wanted {
    /// `params`: FORMAT:TARGET, or a target alone.
    pub params: String,
    /// Whether the guest may write.
    pub access: Access,
    /// How to use the page cache.
    pub cache: Cache,
    /// Memory for the L2 tables of a QCOW2 image.
    pub l2_cache: L2Cache,
    /// When an image's metadata is written.
    pub commits: Commits,
    /// What for.
    pub how: Opening,
    /// How long to wait for a lock of another process.
    pub patience: Duration,
}

/// How long a killed backend's last requests may take: until they have ended, its lock stays, and
/// a successor that went on could see one of them land on newer data. The guest waits meanwhile
/// either way.
const LAST_REQUESTS: Duration = Duration::from_secs(30);
/// How long another user of an image may take to let go of it before a guest connects.
pub(crate) const ANOTHER_USER: Duration = Duration::from_secs(5);

/// Opens the disk that a node names. Its error's text reaches the guest's administrator.
pub type Open = dyn Fn(&Wanted) -> Result<Arc<dyn Disk>, Fault> + Send + Sync;

/// The block backend: gives the xenbus server its devices.
pub struct BlkBackend {
    hypervisor: Arc<dyn Hypervisor>,
    config: Config,
    run_dir: PathBuf,
    open: Arc<Open>,
    groups: Arc<Groups>,
}

impl BlkBackend {
    /// `run_dir` is where stats pages go; `open` opens the disk of each node.
    pub fn new(
        hypervisor: Arc<dyn Hypervisor>,
        config: Config,
        run_dir: PathBuf,
        open: Arc<Open>,
    ) -> BlkBackend {
        BlkBackend { hypervisor, config, run_dir, open, groups: Arc::default() }
    }
}

impl Backend for BlkBackend {
    fn kind(&self) -> &'static str {
        "vbd"
    }
    fn script(&self) -> &'static str {
        SCRIPT
    }
    fn device(&self, id: &DeviceId) -> Box<dyn Device> {
        Box::new(BlkDevice {
            hypervisor: self.hypervisor.clone(),
            config: self.config.clone(),
            run_dir: self.run_dir.clone(),
            open: self.open.clone(),
            groups: self.groups.clone(),
            id: id.clone(),
            serving: None,
            log: LogLimit::default(),
            #[cfg(feature = "test-faults")]
            leak: crate::leak::Node::none(),
        })
    }
}

struct BlkDevice {
    hypervisor: Arc<dyn Hypervisor>,
    config: Config,
    run_dir: PathBuf,
    open: Arc<Open>,
    groups: Arc<Groups>,
    id: DeviceId,
    serving: Option<Serving>,
    /// The guest decides how often it connects.
    log: LogLimit,
    #[cfg(feature = "test-faults")]
    leak: crate::leak::Node,
}

/// What exists while a device is connected. Queues go before the disk.
struct Serving {
    queues: Vec<Queue>,
    config: Config,
    jobs: Jobs,
    disk: Arc<ThrottleDisk>,
    stall: Arc<Stall>,
    changed: Option<Arc<ChangedDisk>>,
    geometry: Geometry,
    _stats: Stats,
}

fn offer(config: &Config) -> Offer {
    // A barrier of more than 11 segments is a BUG in Linux's blkfront.
    let indirect = match config.ordering {
        Ordering::Barrier => 0,
        Ordering::Flush | Ordering::Both => config.max_indirect_segments,
    };
    Offer {
        flush: config.ordering != Ordering::Barrier,
        barrier: config.ordering != Ordering::Flush,
        persistent: config.grants == GrantMode::Persistent,
        max_indirect_segments: indirect,
        max_ring_page_order: config.max_ring_page_order,
        max_queues: config.max_queues,
    }
}

impl BlkDevice {
    /// The device's own knobs over the process's.
    fn config_of(&self, nodes: &Nodes) -> Result<Config, Fault> {
        let mut config = self.config.clone();
        if let Some(options) = nodes.own("options")? {
            config.set_all(&options).map_err(|e| Fault(format!("options: {e}")))?;
        }
        config.agrees().map_err(|e| Fault(format!("options: {e}")))?;
        Ok(config)
    }

    fn wanted(nodes: &Nodes, config: &Config, how: Meeting) -> Result<Wanted, Fault> {
        let params = nodes.own("params")?.filter(|p| !p.is_empty());
        let params = params.ok_or_else(|| Fault("params: names no disk".into()))?;
        let writable = nodes.own("mode")?.is_none_or(|mode| mode.starts_with('w'));
        Ok(Wanted {
            params,
            access: if writable { Access::ReadWrite } else { Access::ReadOnly },
            cache: config.cache,
            l2_cache: config.l2_cache_size,
            commits: config.commits,
            how: Opening::Guest,
            patience: if how == Meeting::Attach { LAST_REQUESTS } else { ANOTHER_USER },
        })
    }

    /// The limits' group: one of its own, or the one that is named. A disk without limits leaves
    /// those that its group has.
    fn group(&self, config: &Config) -> Arc<Group> {
        let Some(name) = &config.throttle_group else { return Group::new(config.limits) };
        let group = self.groups.get(name);
        if config.limits != throttle::Limits::default() {
            group.set(config.limits);
        }
        group
    }

    /// The disk with the faults and delays that it is to have.
    fn tested(disk: Arc<dyn Disk>, config: &Config) -> Arc<dyn Disk> {
        let disk = match config.faults.0.is_empty() {
            true => disk,
            false => FaultyDisk::new(disk, config.faults.clone()),
        };
        match config.delay.most_us {
            0 => disk,
            _ => DelayDisk::new(disk, config.delay),
        }
    }

    /// The log of the disk's changed blocks, where there is or may be one.
    fn logged(disk: &Arc<dyn Disk>, config: &Config) -> Result<Option<Arc<ChangedDisk>>, Fault> {
        if config.changed == ChangedLog::None {
            return Ok(None);
        }
        let changed = ChangedDisk::new(Arc::clone(disk));
        if let ChangedLog::In(path) = &config.changed {
            let begun = changed.log_to(path, &config.log_options(path));
            begun.map_err(|e| Fault(format!("changed_block_log: {e}")))?;
        }
        Ok(Some(changed))
    }

    /// Begins a log of changed blocks, or ends it.
    fn change_log(&self, path: Option<&Path>) -> Result<Value, Fault> {
        let Some(serving) = &self.serving else {
            return Err(Fault("the device is not connected".into()));
        };
        let Some(changed) = &serving.changed else {
            let why = "the device connected with changed_block_log=none; set it to ready before";
            return Err(Fault(why.into()));
        };
        let done = match path {
            Some(path) => changed.start(path, &serving.config.log_options(path)),
            None => changed.stop(),
        };
        done.map_err(|e| Fault(e.to_string()))?;
        // What has ended is read from its file.
        let now = changed.names();
        for name in now.iter().skip(usize::from(path.is_some())) {
            changed.remove(name).map_err(|e| Fault(e.to_string()))?;
        }
        Ok(json!({"ended": now.get(usize::from(path.is_some()))}))
    }

    fn stats(&self, nodes: &Nodes, queues: usize) -> Stats {
        let name = nodes.own("dev").ok().flatten().or_else(|| Vdev(self.id.devid).name());
        let name = name.unwrap_or_else(|| self.id.devid.to_string());
        Stats::create(&self.run_dir, &self.id, name, 4 * queues)
    }

    fn start(
        &self,
        nodes: &Nodes,
        config: &Config,
        serving: &mut Serving,
        limits: Limits,
        (how, faults): (Meeting, &Faults),
    ) -> Result<(), Fault> {
        let accepted = Accepted::read(&offer(config), |key| nodes.front(key).ok().flatten())
            .map_err(|e| Fault(e.to_string()))?;
        let stats = self.stats(nodes, accepted.queues.len());
        let grants = match config.grants {
            GrantMode::Persistent if !accepted.persistent => GrantMode::Copy,
            wanted => wanted,
        };
        let tables = tables(&self.run_dir, &self.id, &accepted, how);
        for (number, (queue, table)) in accepted.queues.iter().zip(tables.memory).enumerate() {
            serving.queues.push(Queue::start(Start {
                hypervisor: &*self.hypervisor,
                disk: &*serving.disk,
                stall: &serving.stall,
                config,
                name: format!("vbd-{}-{}.{number}", self.id.domid, self.id.devid),
                number: number as u32,
                domid: self.id.domid as DomId,
                protocol: accepted.protocol,
                keys: queue,
                grants,
                table,
                past: &tables.past,
                limits,
                faults: faults.clone(),
                ring_counters: stats.block(&format!("ring-{number}")),
                pool_counters: stats.block(&format!("grants-{number}")),
                counters: stats.block(&format!("queue-{number}")),
                engine_counters: stats.block(&format!("engine-{number}")),
            })?);
        }
        serving._stats = stats;
        Ok(())
    }

    /// What the frontend must see when it finds us connected.
    fn disk_keys(nodes: &Nodes, config: &Config, g: &Geometry) -> Result<Vec<Key>, Fault> {
        let cdrom = nodes.own("device-type")?.as_deref() == Some("cdrom");
        let removable = nodes.own("removable")?.as_deref() == Some("1");
        let discard = nodes.own("discard-enable")?.as_deref() != Some("0") && !g.read_only;
        Ok(offer(config).disk_keys(&DiskKeys {
            size: g.size,
            logical_block: g.logical_block,
            physical_block: g.physical_block,
            read_only: g.read_only,
            cdrom,
            removable,
            discard: g.discard.filter(|_| discard),
            secure_discard: g.secure_discard,
        }))
    }

    fn limits(config: &Config, g: &Geometry, keys: &[Key]) -> Limits {
        let has = |name: &str| keys.iter().any(|(key, value)| key == name && value == "1");
        Limits {
            sectors: g.size / 512,
            block_size: g.logical_block,
            mode: if g.read_only { Mode::ReadOnly } else { Mode::ReadWrite },
            max_indirect_segments: offer(config).max_indirect_segments as u16,
            features: Features {
                flush: has("feature-flush-cache"),
                barrier: has("feature-barrier"),
                discard: has("feature-discard"),
                secure_discard: has("discard-secure"),
            },
        }
    }

    /// Answers what is in flight, and ends the queues.
    fn stop(&mut self, why: Parting) {
        let Some(mut serving) = self.serving.take() else { return };
        let begun = Instant::now();
        // What a job holds back goes on, or the queues would wait for it.
        serving.jobs.stop();
        // All are told before the first is waited for.
        serving.queues.iter().for_each(|queue| queue.stop(why));
        serving.queues.clear();
        if self.log.permits(&self.id) {
            tracing::info!("{}: disconnected in {} ms", self.id, begun.elapsed().as_millis());
        }
    }

    /// Changes a knob of the running queues.
    fn set(&mut self, knob: &str, value: &str) -> Result<Value, Fault> {
        let Some(serving) = &mut self.serving else {
            return Err(Fault("the device is not connected".into()));
        };
        let mut config = serving.config.clone();
        // Another disk of the group may have changed them.
        config.limits = serving.disk.group().limits();
        config.set_live(knob, value).map_err(Fault)?;
        config.agrees().map_err(Fault)?;
        serving.disk.group().set(config.limits);
        serving.stall.set(config.policies);
        serving.queues.iter().for_each(|queue| queue.set(&config));
        serving.config = config;
        Ok(json!({"knob": knob, "value": value}))
    }

    /// Looks how large the disk is now and tells the guest if that has changed.
    fn resize(&mut self, nodes: &Nodes) -> Result<u64, Fault> {
        let Some(serving) = &mut self.serving else {
            return Err(Fault("the device is not connected".into()));
        };
        let geometry = serving.disk.refresh()?;
        if geometry.size != serving.geometry.size {
            serving.queues.iter().for_each(|q| q.resize(geometry.size / 512));
            serving.geometry = geometry;
            serving.tell_size(nodes)?;
        }
        Ok(geometry.size)
    }
}

impl Device for BlkDevice {
    fn advertise(&mut self, nodes: &Nodes) -> Result<Vec<Key>, Fault> {
        Ok(offer(&self.config_of(nodes)?).early_keys())
    }

    fn connect(&mut self, nodes: &Nodes, how: Meeting, faults: Faults) -> Result<Vec<Key>, Fault> {
        self.stop(Parting::Frontend);
        let config = self.config_of(nodes)?;
        let wanted = Self::wanted(nodes, &config, how)?;
        let live = LiveDisk::new((self.open)(&wanted)?);
        let jobs = Jobs::new(live.clone(), self.open.clone(), wanted, nodes);
        let disk: Arc<dyn Disk> = live;
        let changed = Self::logged(&disk, &config)?;
        let disk = changed.clone().map_or(disk, |changed| changed as Arc<dyn Disk>);
        let disk = ThrottleDisk::new(Self::tested(disk, &config), self.group(&config));
        let geometry = disk.geometry();
        let keys = Self::disk_keys(nodes, &config, &geometry)?;
        let limits = Self::limits(&config, &geometry, &keys);
        let (queues, _stats) = (Vec::new(), Stats::default());
        let stall = Stall::new(self.id.to_string(), config.policies);
        let mut serving = Serving {
            queues,
            config: config.clone(),
            jobs,
            disk,
            stall,
            changed,
            geometry,
            _stats,
        };
        self.start(nodes, &config, &mut serving, limits, (how, &faults))?;
        if how == Meeting::Attach {
            serving.tell_size(nodes)?;
        }
        if self.log.permits(&self.id) {
            serving.log_begin(&self.id, how);
        }
        self.serving = Some(serving);
        #[cfg(feature = "test-faults")]
        {
            self.leak = crate::leak::Node::of(nodes);
        }
        Ok(if how == Meeting::Fresh { keys } else { Vec::new() })
    }

    fn disconnect(&mut self, why: Parting) {
        self.stop(why);
        // A successor wants to know also that nothing is unanswered.
        if why == Parting::Frontend {
            inflight::forget(&self.run_dir, &self.id);
        }
    }

    fn release(&mut self) {
        self.serving = None;
    }

    fn tick(&mut self, nodes: &Nodes) -> Result<(), Fault> {
        if let Some(serving) = &self.serving {
            serving.queues.iter().for_each(Queue::note_cpu);
        }
        self.resize(nodes).map(drop)
    }

    fn control(&mut self, nodes: &Nodes, line: &str) -> String {
        control::answer(line, |command| match command {
            Command::Resize {} => self.resize(nodes).map(|size| json!({"size": size})),
            Command::Set { knob, value } => self.set(&knob, &value),
            Command::ChangedLogStart { path } => self.change_log(Some(&path)),
            Command::ChangedLogStop {} => self.change_log(None),
            command => {
                let serving = self.serving.as_mut();
                let serving = serving.ok_or_else(|| Fault("the device is not connected".into()))?;
                let told = serving.steer(command)?;
                Ok(serving.with_standing(told))
            }
        })
    }
}

impl Serving {
    fn log_begin(&self, id: &DeviceId, how: Meeting) {
        let queues = self.queues.len();
        match how {
            Meeting::Fresh => tracing::info!("{id}: connected with {queues} queue(s)"),
            Meeting::Attach => {
                let replays: u32 = self.queues.iter().map(|queue| queue.replays).sum();
                tracing::info!(
                    "{id}: attached with {queues} queue(s), {replays} request(s) are served again"
                );
            }
        }
    }

    /// Tells the guest the disk's size, unless it was told that already: a predecessor may have
    /// been killed before it could.
    fn tell_size(&self, nodes: &Nodes) -> Result<(), Fault> {
        let sectors = (self.geometry.size / 512).to_string();
        if nodes.own("sectors")?.as_ref() != Some(&sectors) {
            // Linux's blkfront looks at `sectors` again when it sees us become connected.
            let keys = [("sectors".to_owned(), sectors)];
            nodes.write_state(&keys, State::Connected, Some(State::Connected))?;
            tracing::info!("{}: now {} bytes", nodes.id(), self.geometry.size);
        }
        Ok(())
    }

    /// What concerns jobs.
    fn steer(&mut self, command: Command) -> Result<Value, Fault> {
        match command {
            Command::Pause {} => self.jobs.begin(Task::Pause),
            Command::Resume {} => self.resume(),
            Command::Snapshot { overlay, rename, hold } => self.jobs.begin(Task::Snapshot {
                overlay: overlay.parse()?,
                old: live::old(rename),
                hold: live::hold(hold),
            }),
            Command::Mirror { target, switch, hold } => self.jobs.begin(Task::Mirror {
                target: target.parse()?,
                end: if switch { AtTheEnd::Switch } else { AtTheEnd::Stay },
                hold: live::hold(hold),
            }),
            Command::Commit { base } => self.jobs.begin(Task::Commit { base }),
            Command::Stream { base } => self.jobs.begin(Task::Stream { base }),
            Command::Grow { size } => self.jobs.begin(Task::Grow { size }),
            Command::Coalesce { layer } => self.jobs.begin(Task::Coalesce { layer }),
            Command::Job {} => self.jobs.tell(),
            Command::Cancel {} => self.jobs.cancel(),
            Command::Complete {} => self.jobs.complete(),
            Command::Resize {}
            | Command::Set { .. }
            | Command::ChangedLogStart { .. }
            | Command::ChangedLogStop {} => Err(Fault("not about jobs".into())),
        }
    }

    /// The end of a pause, be it by command or by an error.
    fn resume(&mut self) -> Result<Value, Fault> {
        let stood = self.stall.go_on();
        if stood {
            self.queues.iter().for_each(Queue::wake);
        }
        match self.jobs.resume() {
            Err(_) if stood => self.jobs.tell(),
            resumed => resumed,
        }
    }

    /// An answer about jobs, with the error that has stopped the disk.
    fn with_standing(&self, mut told: Value) -> Value {
        if let (Some(told), Some(standing)) = (told.as_object_mut(), self.stall.standing()) {
            let standing = json!({"error": standing.error(), "requests": standing.requests});
            told.insert("stopped".into(), standing);
        }
        told
    }
}

/// Opens what a node's `FORMAT:TARGET` names; a target alone is raw. Images that build on others
/// open these as `backing` allows.
pub fn open_target(wanted: &Wanted, backing: &BackingPolicy) -> Result<Arc<dyn Disk>, Fault> {
    let (format, path) = match wanted.params.parse() {
        Ok(Name::File { format, path }) => (format, path),
        Ok(Name::Export(_)) => return open_nbd(wanted).map_err(|e| Fault(e.to_string())),
        Err(e) => return Err(Fault(format!("{}: {e}", wanted.params))),
    };
    let file = OpenOptions::new(path).access(wanted.access).cache(wanted.cache);
    let (file, backing) = match wanted.how {
        Opening::Guest => {
            let lock = Lock::Held { sharing: Sharing::Exclusive, wait: wanted.patience };
            (file.lock(lock), backing.clone())
        }
        Opening::Below => (file.lock(Lock::Off), backing.clone()),
        Opening::Read => (file.lock(Lock::Off).access(Access::ReadOnly), backing.clone()),
        Opening::Alone => (file.lock(Lock::Off).access(Access::ReadOnly), BackingPolicy::Ignore),
    };
    let options = ImageOptions::new(format, file).backing(backing).l2_cache(wanted.l2_cache);
    let options = match wanted.how {
        Opening::Guest => options.commits(wanted.commits),
        // What a job writes into another image, a job that is begun again writes again.
        _ => options,
    };
    let disk = match wanted.how {
        Opening::Guest => image::open(&options),
        // With its layers, also where there is but one.
        _ => image::open_image(&options).map(|disk| disk as Arc<dyn Disk>),
    };
    disk.map_err(|e| Fault(e.to_string()))
}

/// The export of an NBD server.
fn open_nbd(wanted: &Wanted) -> io::Result<Arc<dyn Disk>> {
    let target = NbdTarget::parse(&wanted.params).map_err(io::Error::other)?;
    let options = NbdOptions { access: wanted.access, ..NbdOptions::new(target) };
    let named = |e: io::Error| io::Error::new(e.kind(), format!("{}: {e}", wanted.params));
    Ok(NbdDisk::open(options).map_err(named)?)
}

/// As [`open_target`], for a [`BlkBackend`].
pub fn opener(backing: BackingPolicy) -> Arc<Open> {
    Arc::new(move |wanted: &Wanted| open_target(wanted, &backing))
}
