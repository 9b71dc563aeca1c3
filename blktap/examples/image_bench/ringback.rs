//! Our own: raw and QCOW2 through the same engine.
use blktap::image::{self, ImageFormat, ImageOptions};
use blktap::storage::{Cache, OpenOptions};
use blktap::{DiskQueue, IoBuf, Op, Request};

use super::{BLOCK, Image, Load, Places, Result, Watch, Work};

pub(crate) fn raw(image: &Image, load: &Load) -> Result<f64> {
    run(image, ImageFormat::Raw, load)
}

pub(crate) fn qcow2(image: &Image, load: &Load) -> Result<f64> {
    run(image, ImageFormat::Qcow2, load)
}

fn run(image: &Image, format: ImageFormat, load: &Load) -> Result<f64> {
    let cache = if load.direct { Cache::None } else { Cache::Writeback };
    let options = ImageOptions::new(format, OpenOptions::new(&image.path).cache(cache));
    let disk = image::open(&options)?;
    let mut queue = disk.queue(load.depth as u32)?;
    drive(&mut *queue, image.start, load)
}

fn drive(queue: &mut dyn DiskQueue, start: u64, load: &Load) -> Result<f64> {
    let mut memory = vec![1u8; (load.depth + 1) * BLOCK];
    let skip = memory.as_ptr().align_offset(BLOCK);
    let base = memory[skip..].as_mut_ptr();
    let op = if load.work == Work::Read { Op::Read } else { Op::Write };
    let mut places = Places::new(load.work);
    let mut send = |queue: &mut dyn DiskQueue, slot: u64| -> Result<()> {
        let Some(offset) = places.take() else { return Ok(()) };
        // SAFETY: `depth` blocks inside `memory`, which stays until the queue has been drained.
        let bufs = [unsafe { IoBuf::new(base.add(slot as usize * BLOCK), BLOCK) }];
        let request =
            Request { op, offset: start + offset, len: BLOCK as u64, bufs: &bufs, token: slot };
        Ok(queue.submit(&request).map_err(|_| "the queue is full")?)
    };
    let mut watch = Watch::start(load.time);
    for slot in 0..load.depth as u64 {
        send(queue, slot)?;
    }
    let mut done = Vec::new();
    while queue.in_flight() > 0 {
        queue.wait(&[], None)?;
        queue.poll(&mut done)?;
        for d in done.drain(..) {
            if d.errno != 0 {
                return Err(std::io::Error::from_raw_os_error(d.errno).into());
            }
            if watch.one() {
                send(queue, d.token)?;
            }
        }
    }
    Ok(watch.rate())
}
