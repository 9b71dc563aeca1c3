//! Guessing an image's format by its first bytes. Whoever can write a raw image's first sector
//! can make it look like anything: a guess is good for telling, not for opening it to write.
use super::ImageFormat;
use crate::formats::ImageError;
use crate::storage::Storage;

/// What else begins with so many known bytes: (offset, bytes, its name).
const FOREIGN: [(usize, &[u8], &str); 8] = [
    (0, b"vhdxfile", "VHDX"),
    (0, b"KDMV", "VMDK"),
    (0, b"COWD", "VMDK"),
    (0, b"# Disk DescriptorFile", "VMDK"),
    (0, b"LUKS\xba\xbe", "LUKS"),
    (0, b"QED\0", "QED"),
    (0, b"WithoutFreeSpace", "Parallels"),
    (0x40, b"\x7f\x10\xda\xbe", "VDI"),
];

/// The format that the first bytes speak of; `None`: none that is known, so perhaps raw. A VHD
/// of fixed size begins with the guest's bytes and is not told from raw. Formats that are known
/// but not supported are errors.
pub fn probe(storage: &dyn Storage) -> Result<Option<ImageFormat>, ImageError> {
    let mut head = [0; 512];
    storage.read_at(0, &mut head).map_err(ImageError::io("read the first sector"))?;
    if let Some(name) = foreign(&head) {
        return Err(ImageError::Unsupported(format!(
            "it looks like a {name} image (name the format raw to take its bytes as they are)"
        )));
    }
    Ok(known(&head))
}

fn foreign(head: &[u8]) -> Option<&'static str> {
    let is = |(at, magic, _): &&(usize, &[u8], &str)| head[*at..].starts_with(magic);
    FOREIGN.iter().find(is).map(|(_, _, name)| *name)
}

fn known(head: &[u8; 512]) -> Option<ImageFormat> {
    // The footer's copy that a dynamic or differencing VHD begins with.
    if head.starts_with(b"conectix") {
        return Some(ImageFormat::Vhd);
    }
    // QCOW2 versions that are not known are refused by name when it is opened.
    match head {
        [b'Q', b'F', b'I', 0xfb, 0, 0, 0, 1, ..] => Some(ImageFormat::Qcow),
        [b'Q', b'F', b'I', 0xfb, ..] => Some(ImageFormat::Qcow2),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::storage::MemStorage;

    #[test]
    fn by_the_first_bytes() {
        let of = |bytes: &[u8]| probe(&MemStorage::new(bytes.to_vec()));
        let format = |bytes: &[u8]| of(bytes).expect("a guess");
        assert_eq!(format(b"QFI\xfb\0\0\0\x01"), Some(ImageFormat::Qcow));
        for version in [2, 3, 9] {
            assert_eq!(
                format(&[b'Q', b'F', b'I', 0xfb, 0, 0, 0, version]),
                Some(ImageFormat::Qcow2)
            );
        }
        assert_eq!(format(b"conectix"), Some(ImageFormat::Vhd));
        for raw in [&b""[..], b"QFI", b"conecti", &[0; 4096]] {
            assert_eq!(format(raw), None);
        }
        let mut vdi = vec![0; 512];
        vdi[0x40..0x44].copy_from_slice(b"\x7f\x10\xda\xbe");
        for (bytes, name) in [(&b"KDMV"[..], "VMDK"), (&vdi, "VDI"), (b"vhdxfile", "VHDX")] {
            assert!(of(bytes).expect_err(name).to_string().contains(name));
        }
    }
}
