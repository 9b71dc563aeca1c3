//! `ringback disk info`.

use std::os::unix::fs::MetadataExt;
use std::path::Path;
use std::process::ExitCode;

use blktap::image::{BackingPolicy, ImageFormat};
use serde_json::{Map, Value, json};

use super::formats::{self, Details};
use super::open::{Opening, beside, is_nbd};
use super::{Result, about, document, sizes, snapshot};
use crate::cli::disk::Info;

/// One image of a chain.
struct Shown {
    file: String,
    format: ImageFormat,
    size: u64,
    /// Bytes that the file takes.
    actual: Option<u64>,
    details: Details,
}

/// `ringback disk info`.
pub fn run(options: &Info) -> Result {
    let opening = Opening::to_read(&options.file, options.format.as_deref(), &options.allow)
        .force_share(options.force_share);
    let chain = if options.backing_chain { chain(&opening)? } else { vec![shown(&opening)?] };
    if !options.output.json {
        let texts: Vec<String> = chain.iter().map(text).collect();
        out!("{}", texts.join("\n"));
    } else if options.backing_chain {
        document(json!({"chain": chain.iter().map(value).collect::<Vec<_>>()}));
    } else {
        chain.iter().for_each(|s| document(value(s)));
    }
    Ok(ExitCode::SUCCESS)
}

fn shown(opening: &Opening<'_>) -> Result<Shown> {
    let file = opening.file.to_owned();
    if is_nbd(&file) {
        let opened = opening.open()?;
        let size = opened.disk.geometry().size;
        let details = Details::default();
        return Ok(Shown { file, format: opened.format, size, actual: None, details });
    }
    let alone = opening.clone().alone();
    let format = alone.format()?;
    let details = formats::details(&alone, format)?;
    let meta = std::fs::metadata(&file).map_err(about(&file))?;
    Ok(Shown { file, format, size: details.size, actual: Some(meta.blocks() * 512), details })
}

/// The image and those it builds on, as far as the policy allows.
fn chain(opening: &Opening<'_>) -> Result<Vec<Shown>> {
    // Checks the policy, and that the chain ends.
    let (image, _) = opening.image()?;
    let layers: Vec<(String, &'static str)> = image
        .layers()
        .map(|l| (l.files().first().map(|f| f.name()).unwrap_or_default(), l.name()))
        .collect();
    drop(image);
    let mut chain = Vec::new();
    for (file, format) in &layers {
        let backing = BackingPolicy::Ignore;
        let one = Opening { file, format: Some(format), backing, ..opening.clone() };
        chain.push(shown(&one)?);
    }
    Ok(chain)
}

fn value(shown: &Shown) -> Value {
    let details = &shown.details;
    let mut value = Map::new();
    value.insert("filename".into(), shown.file.clone().into());
    value.insert("format".into(), formats::qemu_name(shown.format).into());
    value.insert("virtual-size".into(), shown.size.into());
    if let Some(actual) = shown.actual {
        value.insert("actual-size".into(), actual.into());
    }
    if let Some(cluster) = details.cluster_size {
        value.insert("cluster-size".into(), cluster.into());
    }
    value.insert("dirty-flag".into(), details.dirty.into());
    if let Some(backing) = &details.backing {
        value.insert("backing-filename".into(), backing.name.clone().into());
        let full = beside(Path::new(&shown.file), &backing.name).display().to_string();
        value.insert("full-backing-filename".into(), full.into());
        if let Some(format) = &backing.format {
            value.insert("backing-filename-format".into(), format.clone().into());
        }
    }
    if !details.snapshots.is_empty() {
        let all = details.snapshots.iter().map(snapshot::value).collect::<Vec<_>>();
        value.insert("snapshots".into(), all.into());
    }
    if !details.specific.is_empty() {
        let data: Map<String, Value> =
            details.specific.iter().map(|(k, v)| ((*k).to_owned(), v.clone())).collect();
        let specific = json!({"type": formats::qemu_name(shown.format), "data": data});
        value.insert("format-specific".into(), specific);
    }
    value.into()
}

fn text(shown: &Shown) -> String {
    let details = &shown.details;
    let mut lines = vec![
        format!("image: {}", shown.file),
        format!("file format: {}", shown.format),
        format!("virtual size: {} ({} bytes)", sizes::words(shown.size), shown.size),
        match shown.actual {
            Some(actual) => format!("disk size: {}", sizes::words(actual)),
            None => "disk size: unavailable".into(),
        },
    ];
    if details.dirty {
        lines.push("cleanly shut down: no".into());
    }
    if let Some(cluster) = details.cluster_size {
        lines.push(format!("cluster_size: {cluster}"));
    }
    if let Some(backing) = &details.backing {
        let full = beside(Path::new(&shown.file), &backing.name).display().to_string();
        let actual =
            if full == backing.name { String::new() } else { format!(" (actual path: {full})") };
        lines.push(format!("backing file: {}{actual}", backing.name));
        if let Some(format) = &backing.format {
            lines.push(format!("backing file format: {format}"));
        }
    }
    if !details.snapshots.is_empty() {
        lines.push("Snapshot list:".into());
        lines.extend(snapshot::table(&details.snapshots));
    }
    if !details.specific.is_empty() {
        lines.push("Format specific information:".into());
        lines.extend(details.specific.iter().flat_map(|(k, v)| specific(k, v, 4)));
    }
    lines.push(String::new());
    lines.join("\n")
}

/// A value in words, lists and objects indented below their name.
fn specific(key: &str, value: &Value, indent: usize) -> Vec<String> {
    let name = format!("{:indent$}{}:", "", key.replace('-', " "));
    let below = |items: Vec<(String, &Value)>| {
        let lines = items.into_iter().flat_map(|(k, v)| specific(&k, v, indent + 4));
        std::iter::once(name.clone()).chain(lines).collect()
    };
    match value {
        Value::Array(items) => {
            below(items.iter().enumerate().map(|(n, v)| (format!("[{n}]"), v)).collect())
        }
        Value::Object(items) => below(items.iter().map(|(k, v)| (k.clone(), v)).collect()),
        Value::String(text) => vec![format!("{name} {text}")],
        other => vec![format!("{name} {other}")],
    }
}
