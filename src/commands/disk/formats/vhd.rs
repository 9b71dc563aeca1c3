//! VHD images: fixed, dynamic, differencing.

use std::path::Path;
use std::sync::Arc;

use blktap::formats::Format;
use blktap::formats::vhd::{CreateOptions, Kind, NewParent, Repair as Repairs, Shape, Vhd};
use blktap::image::ImageFormat;
use blktap::storage::{Access, FileStorage, Storage};

use super::super::check::Checked;
use super::super::create::{NewBacking, NewImage};
use super::super::open::{Opening, beside};
use super::super::resize::Wanted;
use super::super::work::Work;
use super::super::{Result, Usage, about};
use super::Details;
use crate::cli::disk::{Preallocation, Repair};

pub const HELP: &str = "\
size=SIZE             bytes of the disk
subformat=KIND        dynamic, fixed; with a backing image it is differencing
force_size=on         the disk has the very size that is asked for (always so)
";

#[derive(Clone, Copy)]
enum Subformat {
    Dynamic,
    Fixed,
}

pub struct Plan {
    options: CreateOptions,
}

pub fn plan(new: &mut NewImage<'_>) -> Result<Plan> {
    let kinds = [("dynamic", Subformat::Dynamic), ("fixed", Subformat::Fixed)];
    let kind = new.options.choice("subformat", &kinds)?;
    if new.options.switch("force_size")? == Some(false) {
        let text = "force_size=off: sizes are not rounded to whole cylinders here";
        return Err(Usage(text.into()).into());
    }
    let shape = match (&new.backing, kind) {
        (Some(backing), None) => Shape::Differencing(describe(new.path, backing)?),
        (Some(_), Some(_)) => {
            return Err(Usage("subformat: with a backing image it is differencing".into()).into());
        }
        (None, Some(Subformat::Fixed)) => Shape::Fixed,
        (None, _) => Shape::Dynamic,
    };
    let name = new.path.display().to_string();
    let size = new.size.checked_next_multiple_of(512);
    let size = size.ok_or_else(|| Usage(format!("{} bytes: too large", new.size)))?;
    Ok(Plan { options: CreateOptions::new(size, shape).map_err(about(&name))? })
}

pub fn create(plan: &Plan, storage: &Arc<FileStorage>, _work: &mut Work) -> Result<()> {
    Vhd::create(&**storage, &plan.options).map_err(about(&storage.name()))
}

/// What a new image says of the one below it.
pub fn describe(image: &Path, backing: &NewBacking) -> Result<NewParent> {
    let found = beside(image, &backing.name);
    let name = found.display().to_string();
    let absolute = found.canonicalize().map_err(about(&name))?;
    let modified = std::fs::metadata(&absolute).and_then(|m| m.modified()).map_err(about(&name))?;
    let id = match backing.format {
        ImageFormat::Raw => None,
        ImageFormat::Vhd => {
            let allow = Default::default();
            let storage = Opening::to_read(&name, Some("vhd"), &allow).storage()?;
            Vhd::open(storage).map_err(about(&name))?.unique_id()
        }
        other => {
            let text = format!("{name}: a VHD builds on a VHD or on raw bytes, not on {other}");
            return Err(Usage(text).into());
        }
    };
    let text = |path: &Path| match path.to_str() {
        Some(text) => Ok(text.to_owned()),
        None => Err(format!("{}: the path is not UTF-8", path.display())),
    };
    Ok(NewParent { id, modified, relative: backing.name.clone(), absolute: text(&absolute)? })
}

pub fn details(storage: Arc<FileStorage>) -> Result<Details> {
    let image = Vhd::open(storage)?;
    let block = (image.kind() != Kind::Fixed).then(|| image.cluster());
    Ok(Details {
        size: image.size(),
        cluster_size: block,
        backing: image.backing(),
        ..Details::default()
    })
}

pub fn check(storage: &dyn Storage, repair: Option<Repair>) -> Result<Checked> {
    let repair = match repair {
        None => Repairs::Nothing,
        Some(Repair::Leaks) => Repairs::Leaks,
        Some(Repair::All) => Repairs::All,
    };
    let report = Vhd::check(storage, repair)?;
    Ok(Checked {
        numbers: vec![
            ("image-end-offset", report.image_end),
            ("total-clusters", report.total_blocks),
            ("allocated-clusters", report.allocated_blocks),
        ],
        findings: report.findings,
        corruptions: report.corruptions.saturating_sub(report.corruptions_fixed),
        leaks: report.leaks.saturating_sub(report.leaks_fixed),
        corruptions_fixed: report.corruptions_fixed,
        leaks_fixed: report.leaks_fixed,
        errors: 0,
    })
}

pub fn resize(opening: &Opening<'_>, wanted: &Wanted) -> Result<()> {
    if wanted.new < wanted.old {
        return Err("a VHD cannot be made smaller: convert it".into());
    }
    if wanted.preallocation != Preallocation::Off {
        return Err(Usage("--preallocation: vhd has only off".into()).into());
    }
    let parent = parent_size(opening)?;
    Ok(Vhd::grow(&*opening.clone().alone().storage()?, parent, wanted.new)?)
}

/// Bytes of the disk that the image builds on.
fn parent_size(opening: &Opening<'_>) -> Result<Option<u64>> {
    let reading = Opening { access: Access::ReadOnly, ..opening.clone() };
    let layers = blktap::image::open_layers(&reading.image_options(ImageFormat::Vhd))?;
    Ok(layers.get(1).map(|parent| parent.size()))
}
