//! What the workspace depends on: licenses that go with MIT OR Apache-2.0, and the order of its own crates.

use std::collections::BTreeMap;
use std::path::Path;
use std::process::Command;

use serde_json::Value;

/// The licenses of `deny.toml`.
fn allowed_licenses() -> Vec<String> {
    let text = std::fs::read_to_string(Path::new(env!("CARGO_MANIFEST_DIR")).join("deny.toml"))
        .expect("deny.toml");
    let deny: toml::Table = text.parse().expect("TOML");
    let list = deny["licenses"]["allow"].as_array().expect("a list of licenses");
    list.iter().map(|l| l.as_str().expect("a license").to_string()).collect()
}

/// Whether an SPDX expression can be met by the allowed licenses.
fn is_allowed(expression: &str, allowed: &[String]) -> bool {
    let plain = expression.replace(['(', ')'], " ").replace('/', " OR ");
    // AND binds closer than OR, and all expressions in use bracket accordingly or use OR alone inside brackets; to be
    // safe an expression with brackets must be met in all its parts.
    if expression.contains('(') {
        return plain.split(" AND ").all(|part| any_of(part, allowed));
    }
    plain.split(" OR ").any(|part| part.split(" AND ").all(|l| is_one(l, allowed)))
}

fn any_of(part: &str, allowed: &[String]) -> bool {
    part.split(" OR ").any(|l| is_one(l, allowed))
}

fn is_one(license: &str, allowed: &[String]) -> bool {
    allowed.iter().any(|a| a == license.trim())
}

fn metadata() -> Value {
    let out = Command::new(env!("CARGO"))
        .args([
            "metadata",
            "--format-version=1",
            "--locked",
            "--offline",
            "--filter-platform=x86_64-unknown-linux-gnu",
        ])
        .current_dir(env!("CARGO_MANIFEST_DIR"))
        .output()
        .expect("cargo metadata");
    assert!(out.status.success(), "{}", String::from_utf8_lossy(&out.stderr));
    serde_json::from_slice(&out.stdout).expect("JSON")
}

/// Each of our packages with its place in the order: a package may depend only on those of a lower number.
fn order() -> BTreeMap<&'static str, u32> {
    BTreeMap::from([
        ("ringback-perf", 0),
        ("ringback-rings", 1),
        ("ringback-blktap", 1),
        ("ringback-hypervisor", 2),
        ("ringback-blkback", 3),
        ("ringback-netback", 3),
        ("ringback-netback", 3),
        ("ringback-pvscsi", 3),
        ("ringback-usbback", 3),
        ("ringback", 4),
    ])
}

#[test]
fn licenses_go_with_ours() {
    let allowed = allowed_licenses();
    let metadata = metadata();
    let packages = metadata["packages"].as_array().expect("packages");
    assert!(packages.len() > 10, "only {} packages were looked at", packages.len());
    let faults: Vec<_> = packages
        .iter()
        .filter(|p| !is_allowed(p["license"].as_str().unwrap_or("none"), &allowed))
        .map(|p| format!("{} {}: {}", p["name"], p["version"], p["license"]))
        .collect();
    assert!(faults.is_empty(), "\n{}\n", faults.join("\n"));
}

#[test]
fn crates_depend_only_on_those_below() {
    let order = order();
    let metadata = metadata();
    let mut faults = Vec::new();
    let mut ours = 0;
    for package in metadata["packages"].as_array().expect("packages") {
        let name = package["name"].as_str().expect("a name");
        if !package["source"].is_null() {
            continue;
        }
        ours += 1;
        let Some(mine) = order.get(name) else {
            faults.push(format!("{name} has no place in the order"));
            continue;
        };
        for dependency in package["dependencies"].as_array().expect("dependencies") {
            let other = dependency["name"].as_str().expect("a name");
            if order.get(other).is_some_and(|o| o >= mine) && dependency["kind"].is_null() {
                faults.push(format!("{name} may not depend on {other}"));
            }
        }
    }
    assert!(ours >= 6, "only {ours} packages of the workspace were seen");
    assert!(faults.is_empty(), "\n{}\n", faults.join("\n"));
}

#[test]
fn pure_crates_make_no_system_call() {
    let metadata = metadata();
    for package in metadata["packages"].as_array().expect("packages") {
        if package["name"] != "ringback-rings" {
            continue;
        }
        let names = package["dependencies"].as_array().expect("dependencies").iter();
        let system: Vec<_> = names
            .filter(|d| d["kind"].is_null())
            .filter_map(|d| d["name"].as_str())
            .filter(|n| ["tokio", "libc", "rustix", "nix", "io-uring"].contains(n))
            .collect();
        assert!(system.is_empty(), "rings depends on {system:?}");
        return;
    }
    panic!("the package ringback-rings was not found");
}

#[test]
fn license_expressions_are_judged() {
    let allowed = ["MIT".to_string(), "Apache-2.0".to_string(), "Unicode-3.0".to_string()];
    for good in ["MIT", "GPL-2.0 OR MIT", "MIT/Apache-2.0", "(MIT OR Apache-2.0) AND Unicode-3.0"] {
        assert!(is_allowed(good, &allowed), "{good}");
    }
    for bad in ["GPL-3.0", "none", "MIT AND GPL-2.0", "(MIT OR Apache-2.0) AND GPL-2.0"] {
        assert!(!is_allowed(bad, &allowed), "{bad}");
    }
}
