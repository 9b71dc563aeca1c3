//! Xen's ring macros, compiled from the header of libxen-dev and loaded into this process.
// Calls into C by address; the example and the test each use a part of it.
#![allow(unsafe_code, dead_code)]

use std::ffi::{CStr, CString, c_char, c_int, c_uint, c_void};
use std::os::unix::ffi::OsStrExt;
use std::path::Path;
use std::process::Command;

use rings::Protocol;

/// As large as a block request and response, like the C side's `toy`.
pub(crate) struct Toy;
impl Protocol for Toy {
    const NAME: &'static str = "toy";
    type Req = [u64; 14];
    type Rsp = [u64; 2];
}

const SOURCE: &str = include_str!("../c/ring.c");
const HEADER: &str = "/usr/include/xen/io/ring.h";

unsafe extern "C" {
    fn dlopen(path: *const c_char, flags: c_int) -> *mut c_void;
    fn dlsym(library: *mut c_void, name: *const c_char) -> *mut c_void;
    fn dlerror() -> *const c_char;
}
const RTLD_NOW: c_int = 2;

/// One end of a C ring (`struct front` or `struct back`).
pub(crate) type End = *mut c_void;

/// The functions of `ring.c`.
pub(crate) struct CRing {
    pub(crate) slots: unsafe extern "C" fn(usize) -> c_uint,
    pub(crate) front_init: unsafe extern "C" fn(*mut u8, usize) -> End,
    pub(crate) front_attach: unsafe extern "C" fn(*mut u8, usize, c_uint) -> End,
    pub(crate) back_attach: unsafe extern "C" fn(*mut u8, usize) -> End,
    pub(crate) free: unsafe extern "C" fn(End),
    pub(crate) front_push: unsafe extern "C" fn(End, *const [u64; 14]) -> c_int,
    pub(crate) front_publish: unsafe extern "C" fn(End) -> c_int,
    pub(crate) front_take: unsafe extern "C" fn(End, *mut [u64; 2]) -> c_int,
    pub(crate) front_arm: unsafe extern "C" fn(End) -> c_int,
    pub(crate) back_take: unsafe extern "C" fn(End, *mut [u64; 14]) -> c_int,
    pub(crate) back_respond: unsafe extern "C" fn(End, *const [u64; 2]),
    pub(crate) back_publish: unsafe extern "C" fn(End) -> c_int,
    pub(crate) back_arm: unsafe extern "C" fn(End) -> c_int,
    pub(crate) roundtrips: unsafe extern "C" fn(*mut u8, usize, u64, c_uint) -> u64,
}

impl CRing {
    /// Compiles `ring.c` with `cc -O3`, what a release build of Rust has too, in `folder` and loads it.
    pub(crate) fn load(folder: &Path) -> Result<CRing, String> {
        if !Path::new(HEADER).exists() {
            return Err(format!("{HEADER} is missing: install the package libxen-dev"));
        }
        let (source, library) = (folder.join("ring.c"), folder.join("ring.so"));
        std::fs::write(&source, SOURCE).map_err(|e| format!("{}: {e}", source.display()))?;
        let output = Command::new("cc")
            .args(["-O3", "-Wall", "-Werror", "-shared", "-fPIC", "-o"])
            .args([&library, &source])
            .output()
            .map_err(|e| format!("cc: {e}: install the package gcc"))?;
        if !output.status.success() {
            return Err(format!("cc: {}", String::from_utf8_lossy(&output.stderr)));
        }
        let path = CString::new(library.as_os_str().as_bytes()).map_err(|e| e.to_string())?;
        // SAFETY: a library of our own, without initialisers; it stays loaded.
        let handle = unsafe { dlopen(path.as_ptr(), RTLD_NOW) };
        if handle.is_null() {
            // SAFETY: dlopen has just failed, so there is a message.
            return Err(unsafe { CStr::from_ptr(dlerror()) }.to_string_lossy().into_owned());
        }
        // SAFETY: the types are those of the functions of these names in ring.c.
        unsafe {
            Ok(CRing {
                slots: symbol(handle, c"c_slots")?,
                front_init: symbol(handle, c"c_front_init")?,
                front_attach: symbol(handle, c"c_front_attach")?,
                back_attach: symbol(handle, c"c_back_attach")?,
                free: symbol(handle, c"c_free")?,
                front_push: symbol(handle, c"c_front_push")?,
                front_publish: symbol(handle, c"c_front_publish")?,
                front_take: symbol(handle, c"c_front_take")?,
                front_arm: symbol(handle, c"c_front_arm")?,
                back_take: symbol(handle, c"c_back_take")?,
                back_respond: symbol(handle, c"c_back_respond")?,
                back_publish: symbol(handle, c"c_back_publish")?,
                back_arm: symbol(handle, c"c_back_arm")?,
                roundtrips: symbol(handle, c"c_roundtrips")?,
            })
        }
    }
}

/// The function called `name`.
///
/// # Safety
/// `F` is a function pointer type, and the one of that function.
unsafe fn symbol<F: Copy>(library: *mut c_void, name: &CStr) -> Result<F, String> {
    // SAFETY: the handle is open and the name ends with a zero.
    let address = unsafe { dlsym(library, name.as_ptr()) };
    if address.is_null() {
        return Err(format!("ring.c has no {}", name.to_string_lossy()));
    }
    assert_eq!(size_of::<F>(), size_of::<*mut c_void>());
    // SAFETY: as promised; not null.
    Ok(unsafe { std::mem::transmute_copy(&address) })
}
