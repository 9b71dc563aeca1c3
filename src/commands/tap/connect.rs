//! `ringback disk connect` and `disconnect`: an image as a device of the kernel's nbd driver.
//!
//! A tapdisk serves it; a file in the run folder says which one has which device.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::Duration;

use blktap::{Handover, NbdTarget};
use serde_json::json;

use super::super::{Context, Result};
use super::{Taps, device};
use crate::cli::disk::{Connect, Disconnect};
use crate::cli::tap::{Image, Target};

/// How long the handshake may take.
const PATIENCE: Duration = Duration::from_secs(10);

impl Taps {
    /// Which tapdisk has a device.
    fn record(&self, index: u32) -> PathBuf {
        self.folder.join(format!("dev-nbd{index}"))
    }

    /// Gives a tapdisk's export to the kernel: the device's number.
    pub(super) fn connect(&self, target: &Target, index: Option<u32>) -> Result<u32> {
        let socket = self.nbd(target.pid, target.minor);
        let path = socket.to_str().ok_or("the run folder's path is not UTF-8")?;
        let link = Handover::connect(&NbdTarget::parse(&format!("nbd:unix:{path}"))?, PATIENCE)?;
        let index = device::connect(index, &link)?;
        fs::write(self.record(index), format!("{} {}\n", target.pid, target.minor))?;
        Ok(index)
    }

    /// Makes a tapdisk with a device: its number.
    pub(super) fn create_device(&self, image: &Image, wanted: Option<&Path>) -> Result<u32> {
        let index = wanted.map(device::index_of).transpose()?;
        let target = self.create(image)?;
        self.connect(&target, index).inspect_err(|_| {
            // The first error is the one that matters.
            let _ = self.to("destroy", &target, &json!({}));
        })
    }

    fn disconnect(&self, index: u32) -> Result<()> {
        if device::is_held(index) {
            return Err(format!("/dev/nbd{index} is in use: unmount it first").into());
        }
        let record = self.record(index);
        let text = fs::read_to_string(&record)
            .map_err(|_| format!("/dev/nbd{index}: `ringback disk connect` has not made it"))?;
        let mut numbers = text.split_whitespace().map(str::parse);
        let (Some(Ok(pid)), Some(Ok(minor))) = (numbers.next(), numbers.next()) else {
            return Err(format!("{}: no pid and minor", record.display()).into());
        };
        device::disconnect(index)?;
        fs::remove_file(&record)?;
        self.to("destroy", &Target { pid, minor, timeout: 60 }, &json!({})).map(drop)
    }
}

/// `ringback disk connect`.
pub fn connect(context: &Context, options: &Connect) -> Result {
    let image = Image {
        args: format!("{}:{}", options.format, std::path::absolute(&options.image)?.display()),
        read_only: options.read_only,
        no_o_direct: options.cached,
        existing: Vec::new(),
        log: None,
        secondary: None,
        standby: false,
        read_cache: false,
        allow_backing: options.allow_backing.clone(),
    };
    let index = Taps::of(context).create_device(&image, options.device.as_deref())?;
    outln!("/dev/nbd{index}");
    Ok(ExitCode::SUCCESS)
}

/// `ringback disk disconnect`.
pub fn disconnect(context: &Context, options: &Disconnect) -> Result {
    Taps::of(context).disconnect(device::index_of(&options.device)?)?;
    Ok(ExitCode::SUCCESS)
}
