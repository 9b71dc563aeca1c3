//! The device that one front-end has: what its messages say, put into effect.

use std::fs::File;
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use rustix::event::{EventfdFlags, eventfd};
use rustix::fs::{MemfdFlags, OFlags, SealFlags, fcntl_add_seals, fcntl_getfl, fcntl_setfl};
use rustix::fs::{ftruncate, memfd_create, readlink};
use rustix::net::{SendFlags, send};
use vhost::VhostUserMemoryRegionBase;
use vhost::vhost_user::message::{
    BackendReq, VhostTransferStateDirection, VhostTransferStatePhase, VhostUserConfigFlags,
    VhostUserInflight, VhostUserLog, VhostUserMemoryRegion, VhostUserShMemConfig,
    VhostUserSharedMsg, VhostUserSingleMemoryRegion, VhostUserVringAddrFlags, VhostUserVringState,
};
use vhost::vhost_user::{
    Error, GpuBackend, Result, VhostUserBackendReqHandlerMut, VhostUserProtocolFeatures,
    VhostUserVirtioFeatures,
};
use virtio_bindings::virtio_config::VIRTIO_F_RING_PACKED;
use virtio_bindings::virtio_ring::VIRTIO_RING_F_EVENT_IDX;

use super::blk::{self, CONFIG_BYTES, WCE_AT, bit};
use super::connection::Cause;
use super::memory::{Described, MAX_REGIONS, Memory, Region, Window};
use super::ring::{Events, MAX_SIZE, stride};
use super::server::Export;
use super::vring::{Addresses, Common, Kind, Vring};
use crate::disk::Disk;

/// Bytes of a configuration space that a front-end may ask for (VHOST_USER_CONFIG_SIZE).
const CONFIG_MAX: usize = 256;

/// The in-flight region of all queues.
struct Inflight {
    region: Window,
    size: u16,
}

/// See the module.
pub struct Device {
    disk: Arc<dyn Disk>,
    id: [u8; blk::ID_BYTES],
    poll_us: u32,
    offered: u64,
    features: u64,
    protocol: u64,
    memory: Memory,
    vrings: Vec<Vring>,
    inflight: Option<Inflight>,
    writeback: Arc<AtomicBool>,
    /// To tell the front-end of a new size.
    channel: Option<OwnedFd>,
    size: u64,
    ended: Arc<OwnedFd>,
    cause: Option<Cause>,
}

fn protocol_features() -> VhostUserProtocolFeatures {
    VhostUserProtocolFeatures::MQ
        | VhostUserProtocolFeatures::REPLY_ACK
        | VhostUserProtocolFeatures::BACKEND_REQ
        | VhostUserProtocolFeatures::CONFIG
        | VhostUserProtocolFeatures::INFLIGHT_SHMFD
        | VhostUserProtocolFeatures::RESET_DEVICE
        | VhostUserProtocolFeatures::CONFIGURE_MEM_SLOTS
}

impl Device {
    pub fn new(export: &Export) -> io::Result<Device> {
        let geometry = export.disk.refresh().unwrap_or_else(|_| export.disk.geometry());
        let vhost = VhostUserVirtioFeatures::PROTOCOL_FEATURES.bits();
        Ok(Device {
            disk: Arc::clone(&export.disk),
            id: export.id(),
            poll_us: export.poll_us,
            offered: blk::features(&geometry, export.queues) | vhost,
            features: 0,
            protocol: 0,
            memory: Memory::default(),
            vrings: (0..export.queues).map(|_| Vring::default()).collect(),
            inflight: None,
            writeback: Arc::new(AtomicBool::new(true)),
            channel: None,
            size: geometry.size,
            ended: Arc::new(eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)?),
            cause: None,
        })
    }

    /// Readable when a queue's thread has ended by itself.
    pub fn ended(&self) -> Arc<OwnedFd> {
        Arc::clone(&self.ended)
    }

    /// Requests of queues that have ended.
    pub fn requests(&self) -> u64 {
        self.vrings.iter().map(|v| v.requests).sum()
    }

    /// Why the last message was refused, if it was.
    pub fn take_cause(&mut self) -> std::result::Result<(), Cause> {
        self.cause.take().map_or(Ok(()), Err)
    }

    /// Why a queue's thread has ended by itself.
    pub fn collect(&mut self) -> std::result::Result<(), Cause> {
        self.vrings.iter_mut().filter(|v| v.has_failed()).try_for_each(Vring::stop)
    }

    /// Ends all queues; all that they have taken is answered.
    pub fn stop_all(&mut self) -> std::result::Result<(), Cause> {
        self.vrings.iter_mut().map(Vring::stop).fold(Ok(()), std::result::Result::and)
    }

    /// Where changes of the configuration are told.
    pub fn set_channel(&mut self, channel: Option<OwnedFd>) {
        self.channel = channel;
    }

    /// Looks whether the disk has another size, and tells the front-end.
    pub fn look_at_size(&mut self) {
        match self.disk.refresh() {
            Ok(geometry) if geometry.size != self.size => {
                tracing::info!("vhost-user: the disk has {} bytes now", geometry.size);
                self.size = geometry.size;
                self.tell_config();
            }
            Ok(_) => {}
            Err(e) => tracing::debug!("vhost-user: looking at the disk's size: {e}"),
        }
    }

    /// VHOST_USER_BACKEND_CONFIG_CHANGE_MSG, without an answer.
    fn tell_config(&mut self) {
        let Some(channel) = &self.channel else { return };
        let words = [u32::from(BackendReq::CONFIG_CHANGE_MSG), 1, 0];
        let message: Vec<u8> = words.into_iter().flat_map(u32::to_ne_bytes).collect();
        if let Err(e) = send(channel, &message, SendFlags::NOSIGNAL | SendFlags::DONTWAIT) {
            tracing::warn!("vhost-user: telling of the disk's new size: {e}");
            self.channel = None;
        }
    }

    fn refuse<T>(&mut self, cause: Cause) -> Result<T> {
        self.cause.get_or_insert(cause);
        Err(Error::InvalidParam)
    }

    fn judge<T>(&mut self, result: std::result::Result<T, Cause>) -> Result<T> {
        result.or_else(|cause| self.refuse(cause))
    }

    fn vring(&mut self, index: u32) -> Result<&mut Vring> {
        let count = self.vrings.len() as u16;
        if index >= u32::from(count) {
            return self.refuse(Cause::NoQueue(index, count));
        }
        Ok(&mut self.vrings[index as usize])
    }

    /// One that does not run.
    fn quiet(&mut self, index: u32, what: &'static str) -> Result<&mut Vring> {
        if self.vring(index)?.is_running() {
            return self.refuse(Cause::Vring(index as u16, what));
        }
        self.vring(index)
    }

    fn common(&self) -> Common {
        let packed = self.features & bit(VIRTIO_F_RING_PACKED) != 0;
        let index = self.features & bit(VIRTIO_RING_F_EVENT_IDX) != 0;
        Common {
            kind: if packed { Kind::Packed } else { Kind::Split },
            events: if index { Events::Index } else { Events::Flags },
            memory: Arc::new(self.memory.clone()),
            disk: Arc::clone(&self.disk),
            id: self.id,
            poll_us: self.poll_us,
            writeback: Arc::clone(&self.writeback),
            ended: Arc::clone(&self.ended),
        }
    }

    /// Starts those of the queues that are ready.
    fn start_ready(&mut self) -> Result<()> {
        if !self.vrings.iter().any(Vring::is_ready) {
            return Ok(());
        }
        let common = self.common();
        let mut result = Ok(());
        for (index, vring) in self.vrings.iter_mut().enumerate().filter(|(_, v)| v.is_ready()) {
            let index = index as u16;
            result = window_of(self.inflight.as_ref(), index, vring.size)
                .and_then(|inflight| vring.start(index, &common, inflight));
            if result.is_err() {
                break;
            }
        }
        self.judge(result)
    }

    /// Changes the memory; queues that run end before, and go on with it.
    fn change_memory(
        &mut self,
        change: impl FnOnce(&mut Memory) -> std::result::Result<(), Cause>,
    ) -> Result<()> {
        let result = self.stop_all().and_then(|()| change(&mut self.memory));
        self.judge(result)?;
        self.start_ready()
    }

    /// The descriptor of a queue, made not to block.
    fn event(
        &mut self,
        index: u8,
        what: &'static str,
        file: Option<File>,
    ) -> Result<Option<OwnedFd>> {
        self.vring(u32::from(index))?;
        let Some(fd) = file.map(OwnedFd::from) else { return Ok(None) };
        match is_eventfd(&fd) {
            true => Ok(Some(fd)),
            false => self.refuse(Cause::Descriptor(u16::from(index), what)),
        }
    }
}

fn is_eventfd(fd: &OwnedFd) -> bool {
    use std::os::fd::AsRawFd;
    let path = format!("/proc/self/fd/{}", fd.as_raw_fd());
    let link = readlink(Path::new(&path), Vec::new());
    let is = link.is_ok_and(|link| link.as_bytes().starts_with(b"anon_inode:[eventfd"));
    is && fcntl_getfl(fd).and_then(|flags| fcntl_setfl(fd, flags | OFlags::NONBLOCK)).is_ok()
}

/// The part of the in-flight region that a queue has.
fn window_of(
    inflight: Option<&Inflight>,
    index: u16,
    size: u16,
) -> std::result::Result<Option<Window>, Cause> {
    let Some(Inflight { region, size: each }) = inflight else { return Ok(None) };
    let bytes = stride(*each);
    let at = usize::try_from(u64::from(index) * bytes).unwrap_or(usize::MAX);
    let part = region.part(at, usize::try_from(bytes).unwrap_or(usize::MAX));
    match part {
        Some(part) if *each == size => Ok(Some(part)),
        Some(_) => Err(Cause::Inflight(format!("it is for queues of {each} entries"))),
        None => Err(Cause::Inflight(format!("it has no place for queue {index}"))),
    }
}

fn described(region: &VhostUserMemoryRegion) -> Described {
    Described {
        guest: region.guest_phys_addr,
        user: region.user_addr,
        len: region.memory_size,
        offset: region.mmap_offset,
    }
}

fn unsupported<T>() -> Result<T> {
    Err(Error::InvalidOperation("it was not offered"))
}

impl VhostUserBackendReqHandlerMut for Device {
    fn set_owner(&mut self) -> Result<()> {
        Ok(())
    }

    fn reset_owner(&mut self) -> Result<()> {
        self.reset_device()
    }

    fn reset_device(&mut self) -> Result<()> {
        let stopped = self.stop_all();
        self.vrings.iter_mut().for_each(|v| v.enabled = false);
        self.judge(stopped)
    }

    fn get_features(&mut self) -> Result<u64> {
        Ok(self.offered)
    }

    fn set_features(&mut self, features: u64) -> Result<()> {
        if features & !self.offered != 0 {
            return self.refuse(Cause::Features(features, self.offered));
        }
        self.features = features;
        self.writeback.store(blk::may_cache(features), Ordering::Relaxed);
        if features & VhostUserVirtioFeatures::PROTOCOL_FEATURES.bits() == 0 {
            self.vrings.iter_mut().for_each(|v| v.enabled = true);
        }
        Ok(())
    }

    fn set_mem_table(
        &mut self,
        regions: &[VhostUserMemoryRegion],
        files: Vec<File>,
        _: Option<bool>,
    ) -> Result<Option<Vec<VhostUserMemoryRegionBase>>> {
        self.change_memory(|memory| {
            let mut all = Memory::default();
            for (region, file) in regions.iter().zip(&files) {
                all.add(Region::map(described(region), file)?)?;
            }
            *memory = all;
            Ok(())
        })?;
        Ok(None)
    }

    fn set_vring_num(&mut self, index: u32, num: u32) -> Result<()> {
        let vring = self.quiet(index, "gets another size while it runs")?;
        match u16::try_from(num) {
            Ok(size) if (1..=MAX_SIZE).contains(&size) => vring.size = size,
            _ => {
                let cause = Cause::Vring(index as u16, "has a size that is not from 1 to 1024");
                return self.refuse(cause);
            }
        }
        Ok(())
    }

    fn set_vring_addr(
        &mut self,
        index: u32,
        flags: VhostUserVringAddrFlags,
        descriptor: u64,
        used: u64,
        available: u64,
        _: u64,
    ) -> Result<()> {
        if !flags.is_empty() {
            return self
                .refuse(Cause::Vring(index as u16, "is to be logged, which was not offered"));
        }
        let addresses = Addresses { desc: descriptor, driver: available, device: used };
        let vring = self.vring(index)?;
        if vring.is_running() {
            // QEMU says it again where it looks at what it logs.
            return match vring.addresses == Some(addresses) {
                true => Ok(()),
                false => self.refuse(Cause::Vring(index as u16, "is moved while it runs")),
            };
        }
        vring.addresses = Some(addresses);
        self.start_ready()
    }

    fn set_vring_base(&mut self, index: u32, base: u32) -> Result<()> {
        self.quiet(index, "is set back while it runs")?.base = base;
        Ok(())
    }

    fn get_vring_base(&mut self, index: u32) -> Result<VhostUserVringState> {
        let vring = self.vring(index)?;
        let stopped = vring.stop();
        // Until it is started anew.
        vring.kick = None;
        let base = vring.base;
        self.judge(stopped)?;
        Ok(VhostUserVringState::new(index, base))
    }

    fn set_vring_kick(&mut self, index: u8, fd: Option<File>) -> Result<()> {
        let Some(fd) = self.event(index, "kick", fd)? else {
            let cause = Cause::Vring(u16::from(index), "is to be polled, without a descriptor");
            return self.refuse(cause);
        };
        let stopped = self.vring(u32::from(index))?.stop();
        self.judge(stopped)?;
        self.vring(u32::from(index))?.kick = Some(Arc::new(fd));
        self.start_ready()
    }

    fn set_vring_call(&mut self, index: u8, fd: Option<File>) -> Result<()> {
        let fd = self.event(index, "call", fd)?;
        self.vring(u32::from(index))?.set_call(fd);
        Ok(())
    }

    fn set_vring_err(&mut self, index: u8, fd: Option<File>) -> Result<()> {
        let fd = self.event(index, "error", fd)?;
        self.vring(u32::from(index))?.err = fd;
        Ok(())
    }

    fn get_protocol_features(&mut self) -> Result<VhostUserProtocolFeatures> {
        Ok(protocol_features())
    }

    fn set_protocol_features(&mut self, features: u64) -> Result<()> {
        let offered = protocol_features().bits();
        if features & !offered != 0 {
            return self.refuse(Cause::Features(features, offered));
        }
        self.protocol = features;
        Ok(())
    }

    fn get_queue_num(&mut self) -> Result<u64> {
        Ok(self.vrings.len() as u64)
    }

    fn set_vring_enable(&mut self, index: u32, enable: bool) -> Result<()> {
        let vring = self.vring(index)?;
        vring.enabled = enable;
        if enable {
            return self.start_ready();
        }
        let stopped = vring.stop();
        self.judge(stopped)
    }

    fn get_config(&mut self, offset: u32, size: u32, _: VhostUserConfigFlags) -> Result<Vec<u8>> {
        let mut bytes = [0; CONFIG_MAX];
        let writeback = self.writeback.load(Ordering::Relaxed);
        let geometry = self.disk.geometry();
        let config = blk::config(&geometry, self.vrings.len() as u16, writeback);
        bytes[..CONFIG_BYTES].copy_from_slice(&config);
        let end = (offset as usize).checked_add(size as usize);
        let part = end.and_then(|end| bytes.get(offset as usize..end));
        part.map(<[u8]>::to_vec).ok_or(Error::InvalidParam)
    }

    fn set_config(&mut self, offset: u32, buf: &[u8], _: VhostUserConfigFlags) -> Result<()> {
        match (offset as usize, buf) {
            (WCE_AT, [byte @ (0 | 1)]) => {
                self.writeback.store(*byte == 1, Ordering::Relaxed);
                Ok(())
            }
            _ => self.refuse(Cause::Config { offset, len: buf.len() }),
        }
    }

    fn set_gpu_socket(&mut self, _: GpuBackend) -> Result<()> {
        unsupported()
    }

    fn get_shared_object(&mut self, _: VhostUserSharedMsg) -> Result<File> {
        unsupported()
    }

    fn get_inflight_fd(&mut self, wanted: &VhostUserInflight) -> Result<(VhostUserInflight, File)> {
        let (queues, size) = (wanted.num_queues, wanted.queue_size);
        if usize::from(queues) > self.vrings.len() || size > MAX_SIZE {
            let text = format!("{queues} queues of {size} entries");
            return self.refuse(Cause::Inflight(text));
        }
        let bytes = stride(size) * u64::from(queues);
        let made = make_memfd(bytes).and_then(|file| {
            let region = Window::of_file(&file, 0, bytes).map_err(io::Error::other)?;
            Ok((file, region))
        });
        let (file, region) = self.judge(made.map_err(Cause::Resources))?;
        self.inflight = Some(Inflight { region, size });
        Ok((VhostUserInflight::new(bytes, 0, queues, size), file))
    }

    fn set_inflight_fd(&mut self, given: &VhostUserInflight, file: File) -> Result<()> {
        if self.vrings.iter().any(Vring::is_running) {
            let text = "it comes while a queue runs".to_owned();
            return self.refuse(Cause::Inflight(text));
        }
        let need = stride(given.queue_size) * u64::from(given.num_queues);
        if given.queue_size > MAX_SIZE || given.mmap_size < need {
            let text = format!(
                "{} queues of {} entries in {} bytes",
                given.num_queues, given.queue_size, given.mmap_size
            );
            return self.refuse(Cause::Inflight(text));
        }
        let region = Window::of_file(&file, given.mmap_offset, given.mmap_size);
        let region = self.judge(region.map_err(|e| Cause::Inflight(e.to_string())))?;
        self.inflight = Some(Inflight { region, size: given.queue_size });
        Ok(())
    }

    fn get_max_mem_slots(&mut self) -> Result<u64> {
        Ok(MAX_REGIONS as u64)
    }

    fn add_mem_region(
        &mut self,
        region: &VhostUserSingleMemoryRegion,
        file: File,
        _: Option<bool>,
    ) -> Result<Option<VhostUserMemoryRegionBase>> {
        self.change_memory(|memory| Ok(memory.add(Region::map(described(region), &file)?)?))?;
        Ok(None)
    }

    fn remove_mem_region(&mut self, region: &VhostUserSingleMemoryRegion) -> Result<()> {
        self.change_memory(|memory| Ok(memory.remove(described(region))?))
    }

    fn set_device_state_fd(
        &mut self,
        _: VhostTransferStateDirection,
        _: VhostTransferStatePhase,
        _: File,
    ) -> Result<Option<File>> {
        unsupported()
    }

    fn check_device_state(&mut self) -> Result<()> {
        unsupported()
    }

    fn get_shmem_config(&mut self) -> Result<VhostUserShMemConfig> {
        unsupported()
    }

    fn set_log_base(&mut self, _: &VhostUserLog, _: File) -> Result<()> {
        unsupported()
    }
}

/// Memory that nobody can cut short.
fn make_memfd(bytes: u64) -> io::Result<File> {
    let fd = memfd_create(c"vhost-inflight", MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING)?;
    ftruncate(fd.as_fd(), bytes)?;
    fcntl_add_seals(fd.as_fd(), SealFlags::SHRINK | SealFlags::GROW | SealFlags::SEAL)?;
    Ok(fd.into())
}
