//! What the commands have to know of each format.

mod raw;

use std::sync::Arc;

use blktap::image::ImageFormat;
use blktap::storage::FileStorage;

use super::create::NewImage;
use super::work::Work;
use super::{Result, Usage};

/// How an image is made, with all options understood.
pub enum Plan {
    Raw(raw::Plan),
}

/// Understands the options of a new image.
pub fn plan(new: &mut NewImage<'_>) -> Result<Plan> {
    if new.backing.is_some() && new.format == ImageFormat::Raw {
        return Err(Usage("a raw image has no backing file; qcow2 and vhd have".into()).into());
    }
    match new.format {
        ImageFormat::Raw => Ok(Plan::Raw(raw::plan(new)?)),
        other => Err(format!("{}: format {other} cannot be made", new.path.display()).into()),
    }
}

impl Plan {
    pub fn carry_out(&self, storage: &Arc<FileStorage>, work: &mut Work) -> Result<()> {
        match self {
            Plan::Raw(plan) => raw::create(plan, storage, work),
        }
    }
}

/// The options of a format, one a line.
pub fn help(format: ImageFormat) -> String {
    match format {
        ImageFormat::Raw => raw::HELP.into(),
        _ => String::new(),
    }
}
