//! The peers: as their own documentation drives them, `depth` tasks on one thread.
use std::cell::RefCell;
use std::rc::Rc;

use imago::{FormatAccess, FormatDriverBuilder, PermissiveImplicitOpenGate, StorageOpenOptions};
use qcow2_rs::dev::Qcow2DevParams;
use qcow2_rs::helpers::Qcow2IoBuf;
use qcow2_rs::utils::qcow2_setup_dev_uring;

use super::{BLOCK, Image, Load, Places, Result, Watch, Work};

/// What the tasks of a run share.
struct Turns(RefCell<(Places, Watch)>);

impl Turns {
    fn new(load: &Load) -> Rc<Turns> {
        Rc::new(Turns(RefCell::new((Places::new(load.work), Watch::start(load.time)))))
    }
    fn next(&self) -> Option<u64> {
        let (places, watch) = &mut *self.0.borrow_mut();
        if watch.goes_on() { places.take() } else { None }
    }
    fn done(&self) {
        self.0.borrow_mut().1.one();
    }
    fn rate(&self) -> f64 {
        self.0.borrow().1.rate()
    }
}

pub(crate) fn qcow2_rs(image: &Image, load: &Load) -> Result<f64> {
    let (path, load) = (image.path.clone(), *load);
    tokio_uring::start(async move {
        let params = Qcow2DevParams::new(9, None, None, load.work == Work::Read, load.direct);
        let dev = qcow2_setup_dev_uring(&path, &params).await.map_err(|e| e.to_string())?;
        let (dev, turns) = (Rc::new(dev), Turns::new(&load));
        let tasks: Vec<_> = (0..load.depth)
            .map(|_| {
                let (dev, turns) = (Rc::clone(&dev), Rc::clone(&turns));
                tokio_uring::spawn(async move {
                    let mut buf = Qcow2IoBuf::<u8>::new(BLOCK);
                    while let Some(offset) = turns.next() {
                        match load.work {
                            Work::Read => dev.read_at(&mut buf, offset).await.map(drop),
                            _ => dev.write_at(&buf, offset).await,
                        }
                        .map_err(|e| e.to_string())?;
                        turns.done();
                    }
                    Ok::<(), String>(())
                })
            })
            .collect();
        for task in tasks {
            task.await.map_err(|e| e.to_string())??;
        }
        let rate = turns.rate();
        dev.flush_meta().await.map_err(|e| e.to_string())?;
        Ok(rate)
    })
}

pub(crate) fn imago(of: &Image, load: &Load) -> Result<f64> {
    let runtime = tokio::runtime::Builder::new_current_thread().build()?;
    let local = tokio::task::LocalSet::new();
    local.block_on(&runtime, async {
        let image = imago::qcow2::Qcow2::<imago::file::File>::builder_path(&of.path)
            .storage_open_options(StorageOpenOptions::new().direct(load.direct))
            .write(load.work != Work::Read)
            .open(PermissiveImplicitOpenGate::default())
            .await?;
        let (image, turns) = (Rc::new(FormatAccess::new(image)), Turns::new(load));
        let tasks: Vec<_> = (0..load.depth)
            .map(|_| {
                let (image, turns, work) = (Rc::clone(&image), Rc::clone(&turns), load.work);
                tokio::task::spawn_local(async move {
                    let mut buf = Qcow2IoBuf::<u8>::new(BLOCK);
                    while let Some(offset) = turns.next() {
                        match work {
                            Work::Read => image.read(&mut buf[..], offset).await?,
                            _ => image.write(&buf[..], offset).await?,
                        }
                        turns.done();
                    }
                    Ok::<(), std::io::Error>(())
                })
            })
            .collect();
        for task in tasks {
            task.await??;
        }
        let rate = turns.rate();
        image.flush().await?;
        Ok(rate)
    })
}
