//! The house's style, checked: sizes of functions and files, no unfinished or ignored code, `unsafe` only where a module
//! opts in, a README in each crate, and names that say what a file holds.

use std::fs;
use std::path::{Path, PathBuf};

use proc_macro2::{Delimiter, TokenStream, TokenTree};
use syn::spanned::Spanned;
use syn::visit::Visit;

const MAX_FUNCTION_LINES: usize = 70;
const MAX_FILE_LINES: usize = 600;

/// Longer functions: (file, function, reason).
const LONG_FUNCTIONS: &[(&str, &str, &str)] = &[];
/// Longer files: (file, reason).
const LONG_FILES: &[(&str, &str)] = &[];
/// Names that say nothing about what is inside.
const EMPTY_NAMES: &[&str] = &["util", "utils", "common", "manager", "helper", "helpers", "misc"];

fn root() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR"))
}

/// The folders of the workspace's packages, the root first.
fn crates() -> Vec<PathBuf> {
    let mut found = vec![root().to_path_buf()];
    for entry in fs::read_dir(root()).expect("the root folder").flatten() {
        if entry.path().join("Cargo.toml").is_file() {
            found.push(entry.path());
        }
    }
    found.sort();
    found
}

/// All Rust sources below a folder, without build output.
fn sources(dir: &Path, found: &mut Vec<PathBuf>) {
    for entry in fs::read_dir(dir).expect("a source folder").flatten() {
        let path = entry.path();
        let name = entry.file_name();
        if path.is_dir() {
            if name != "target" && !name.to_string_lossy().starts_with('.') {
                sources(&path, found);
            }
        } else if path.extension().is_some_and(|e| e == "rs") {
            found.push(path);
        }
    }
}

/// Each source as (path below the root, text).
fn texts() -> Vec<(String, String)> {
    let mut paths = Vec::new();
    sources(root(), &mut paths);
    paths.sort();
    let text = |p: &PathBuf| {
        let name = p.strip_prefix(root()).expect("below the root").display().to_string();
        (name, fs::read_to_string(p).expect("a source file"))
    };
    paths.iter().map(text).collect()
}

/// Functions with their names and lengths in lines, from the signature to the closing brace.
#[derive(Default)]
struct Functions(Vec<(String, usize)>);

impl Functions {
    fn of(text: &str) -> Self {
        let mut found = Self::default();
        found.visit_file(&syn::parse_file(text).expect("Rust source"));
        found
    }

    fn add(&mut self, sig: &syn::Signature, block: &syn::Block) {
        let lines = block.span().end().line - sig.span().start().line + 1;
        self.0.push((sig.ident.to_string(), lines));
    }
}

impl<'ast> Visit<'ast> for Functions {
    fn visit_item_fn(&mut self, f: &'ast syn::ItemFn) {
        self.add(&f.sig, &f.block);
        syn::visit::visit_item_fn(self, f);
    }

    fn visit_impl_item_fn(&mut self, f: &'ast syn::ImplItemFn) {
        self.add(&f.sig, &f.block);
        syn::visit::visit_impl_item_fn(self, f);
    }

    fn visit_trait_item_fn(&mut self, f: &'ast syn::TraitItemFn) {
        if let Some(block) = &f.default {
            self.add(&f.sig, block);
        }
        syn::visit::visit_trait_item_fn(self, f);
    }
}

/// What the tokens of a file hold, comments and strings left out.
#[derive(Debug, Default, PartialEq)]
struct Found {
    unfinished: Vec<String>,
    ignored: Vec<String>,
    has_unsafe: bool,
    opts_in: bool,
}

impl Found {
    fn of(text: &str) -> Self {
        let mut found = Self::default();
        found.walk(text.parse().expect("Rust tokens"));
        found
    }

    fn walk(&mut self, tokens: TokenStream) {
        let mut tokens = tokens.into_iter().peekable();
        while let Some(token) = tokens.next() {
            match token {
                TokenTree::Ident(name) => {
                    let called =
                        matches!(tokens.peek(), Some(TokenTree::Punct(p)) if p.as_char() == '!');
                    if called && (name == "todo" || name == "unimplemented") {
                        self.unfinished.push(name.to_string());
                    }
                    self.has_unsafe |= name == "unsafe";
                }
                TokenTree::Group(group) if group.delimiter() == Delimiter::Bracket => {
                    self.bracket(&group.stream());
                    self.walk(group.stream());
                }
                TokenTree::Group(group) => self.walk(group.stream()),
                TokenTree::Punct(_) | TokenTree::Literal(_) => {}
            }
        }
    }

    /// The inside of `#[...]` or of an array.
    fn bracket(&mut self, inside: &TokenStream) {
        let text = inside.to_string().replace(' ', "");
        if text == "ignore" || text.starts_with("ignore=") {
            self.ignored
                .push(text.trim_start_matches("ignore").trim_matches(['=', '"']).to_owned());
        }
        self.opts_in |= (text.starts_with("allow(") || text.starts_with("expect("))
            && text.contains("unsafe_code");
    }
}

fn report(faults: &[String]) {
    assert!(faults.is_empty(), "\n{}\n", faults.join("\n"));
}

#[test]
fn functions_fit_a_page() {
    let mut faults = Vec::new();
    let mut excused = Vec::new();
    for (file, text) in texts() {
        for (name, lines) in Functions::of(&text).0 {
            if lines <= MAX_FUNCTION_LINES {
                continue;
            }
            if LONG_FUNCTIONS.iter().any(|(f, n, _)| *f == file && *n == name) {
                excused.push((file.clone(), name));
            } else {
                faults.push(format!(
                    "{file}: {name} has {lines} lines, {MAX_FUNCTION_LINES} are allowed"
                ));
            }
        }
    }
    for (file, name, _) in LONG_FUNCTIONS {
        if !excused.iter().any(|(f, n)| f == file && n == name) {
            faults.push(format!("{file}: {name} needs no exception"));
        }
    }
    report(&faults);
}

#[test]
fn files_stay_readable() {
    let mut faults = Vec::new();
    for (file, text) in texts() {
        let lines = text.lines().count();
        let excused = LONG_FILES.iter().any(|(f, _)| *f == file);
        if lines > MAX_FILE_LINES && !excused {
            faults.push(format!("{file}: {lines} lines, {MAX_FILE_LINES} are allowed"));
        }
        if lines <= MAX_FILE_LINES && excused {
            faults.push(format!("{file}: needs no exception"));
        }
    }
    report(&faults);
}

#[test]
fn nothing_is_unfinished_or_ignored() {
    let mut faults = Vec::new();
    for (file, text) in texts() {
        let found = Found::of(&text);
        faults.extend(found.unfinished.iter().map(|m| format!("{file}: {m}!")));
        // A test that another one runs as a process of its own is ignored only by name.
        let run_by_another = |reason: &str| {
            reason.strip_prefix("runby").is_some_and(|name| text.contains(&format!("fn {name}(")))
        };
        for reason in found.ignored.iter().filter(|r| !run_by_another(r)) {
            faults.push(format!("{file}: an ignored test ({reason})"));
        }
    }
    report(&faults);
}

/// Files that may opt in for this one: itself and the modules around it. `a/b/c.rs` is inside `a/b.rs`, `a/b/mod.rs` and
/// `a/b/main.rs`; what lies in folders of `tests/` is inside the test crates there.
fn is_inside(file: &str, module: &str) -> bool {
    let module = module.trim_end_matches(".rs");
    let stem = module.strip_suffix("/mod").or(module.strip_suffix("/main")).unwrap_or(module);
    let folder = file.rsplit_once('/').map_or("", |(folder, _)| folder);
    let below = |dir: &str| folder == dir || folder.starts_with(&format!("{dir}/"));
    let test_crate = module.rsplit_once("tests/").filter(|(_, name)| !name.contains('/'));
    below(stem) || test_crate.is_some_and(|(dir, _)| below(&format!("{dir}tests")))
}

#[test]
fn unsafe_is_fenced() {
    let all: Vec<_> = texts().into_iter().map(|(f, t)| (Found::of(&t), f, t)).collect();
    let fences: Vec<_> =
        all.iter().filter(|(found, ..)| found.opts_in).map(|(_, f, _)| f).collect();
    let users: Vec<_> =
        all.iter().filter(|(found, ..)| found.has_unsafe).map(|(_, f, _)| f).collect();
    let mut faults = Vec::new();
    for file in &users {
        if !fences.iter().any(|fence| fence == file || is_inside(file, fence)) {
            faults.push(format!("{file}: unsafe without #![allow(unsafe_code)]"));
        }
    }
    for fence in &fences {
        if fence.ends_with("src/lib.rs") || fence.ends_with("src/main.rs") {
            faults.push(format!(
                "{fence}: opts in for a whole crate; only the module that needs it may"
            ));
        }
        if !users.iter().any(|file| file == fence || is_inside(file, fence)) {
            faults.push(format!("{fence}: opts in and holds no unsafe"));
        }
    }
    for (found, file, text) in &all {
        if found.has_unsafe && !text.contains("SAFETY:") && !text.contains("# Safety") {
            faults.push(format!("{file}: unsafe without its reason"));
        }
    }
    report(&faults);
}

#[test]
fn every_crate_has_a_readme() {
    let missing = crates()
        .into_iter()
        .filter(|c| !fs::read_to_string(c.join("README.md")).is_ok_and(|t| t.trim().len() > 100))
        .map(|c| format!("{}: no README.md with something in it", c.display()));
    report(&missing.collect::<Vec<_>>());
}

#[test]
fn names_say_what_is_inside() {
    let mut faults = Vec::new();
    for (file, _) in texts() {
        let parts = file.trim_end_matches(".rs").split('/');
        if let Some(part) = parts.into_iter().find(|p| EMPTY_NAMES.contains(p)) {
            faults.push(format!("{file}: '{part}' says nothing"));
        }
    }
    report(&faults);
}

#[test]
fn the_sources_are_found() {
    let texts = texts();
    for file in ["src/lib.rs", "rings/src/lib.rs", "hypervisor/src/lib.rs", "tests/tidy.rs"] {
        assert!(texts.iter().any(|(f, _)| f == file), "{file} was not looked at");
    }
}

/// The checks themselves: each finds what it is for.
#[test]
fn the_checks_see_faults() {
    let long = format!("fn long() {{\n{}}}\nfn short() {{}}\n", "    x();\n".repeat(69));
    assert_eq!(Functions::of(&long).0, [("long".to_string(), 71), ("short".to_string(), 1)]);
    let nested = "impl A { fn a() { fn b() {} } } trait T { fn c() {} fn d(); }";
    let names: Vec<_> = Functions::of(nested).0.into_iter().map(|(n, _)| n).collect();
    assert_eq!(names, ["a", "b", "c"]);

    let todo = Found::of("fn f() { if x { todo!(\"later\") } }");
    assert_eq!(todo.unfinished, ["todo"]);
    assert_eq!(Found::of("// todo!()\nconst S: &str = \"unsafe todo!()\";"), Found::default());
    assert_eq!(Found::of("#[test]\n#[ignore = \"slow\"]\nfn f() {}").ignored, ["slow"]);
    let fenced = Found::of("#![allow(dead_code, unsafe_code)]\nfn f() { unsafe { g() } }");
    assert!(fenced.has_unsafe && fenced.opts_in);
    assert!(is_inside("a/src/engine/ops.rs", "a/src/engine.rs"));
    assert!(is_inside("a/tests/x/y.rs", "a/tests/x/main.rs"));
    assert!(is_inside("a/tests/support/mod.rs", "a/tests/raw.rs"));
    assert!(!is_inside("a/src/enginery/ops.rs", "a/src/engine.rs"));
    assert!(!is_inside("a/src/b.rs", "a/src/c.rs"));
    assert!(Found::of("macro_rules! m { () => { unsafe { g() } } }").has_unsafe);
}
