//! What a file is by its first bytes. Only a qcow2 header is ever believed; the others are named to people.

use std::fs::File;
use std::io::{self, Read};
use std::path::Path;

/// How much of a file is looked at.
const LOOKED_AT_BYTES: u64 = 512;

/// The first bytes of a qcow2 image.
const QCOW2: &[u8] = b"QFI\xfb";

/// Where the first bytes of other formats lie, what they are, the name of the format, and what makes qcow2 of it.
const OTHERS: [(usize, &[u8], &str, &str); 9] = [
    (0, b"KDMV", "VMDK image", "qcow2 convert"),
    (0, b"COWD", "VMDK image", "qcow2 convert"),
    (0, b"# Disk DescriptorFile", "VMDK descriptor", "qcow2 convert"),
    (0, b"vhdxfile", "VHDX image", "qemu-img convert"),
    (0, b"conectix", "VHD image", "qemu-img convert"),
    (64, b"\x7f\x10\xda\xbe", "VDI image", "qemu-img convert"),
    (64, b"\xbe\xda\x10\x7f", "VDI image", "qemu-img convert"),
    (0, b"QED\0", "QED image", "qemu-img convert"),
    (0, b"WithoutFreeSpace", "Parallels image", "qemu-img convert"),
];

/// The beginning of a file.
pub(super) struct FirstBytes(Vec<u8>);

impl FirstBytes {
    /// Reads them.
    pub(super) fn of(path: &Path) -> io::Result<Self> {
        let mut bytes = Vec::new();
        File::open(path)?.take(LOOKED_AT_BYTES).read_to_end(&mut bytes)?;
        Ok(Self(bytes))
    }

    pub(super) fn is_qcow2(&self) -> bool {
        self.0.starts_with(QCOW2)
    }

    /// Why they are no qcow2 image, and what to do about it.
    pub(super) fn why_not_qcow2(&self) -> String {
        let is_there = |(at, magic, ..): &&(usize, &[u8], &str, &str)| {
            self.0.get(*at..).is_some_and(|rest| rest.starts_with(magic))
        };
        if let Some((_, _, what, converter)) = OTHERS.iter().find(is_there) {
            return format!("it is a {what}, and no qcow2 one: `{converter}` makes one of it");
        }
        let raw = "say format=raw if it is a raw one";
        match (self.0.len(), self.is_qcow2()) {
            (0, _) => format!("it is empty, and no qcow2 image; {raw}"),
            (bytes, true) => format!(
                "it ends after {bytes} bytes, within the header of a qcow2 image: was it copied as a whole?"
            ),
            (bytes @ ..24, false) => format!("{bytes} bytes are no qcow2 image; {raw}"),
            (_, false) => format!("it is no qcow2 image; {raw}"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_no_qcow2_image_is_named_by_its_first_bytes() {
        let vdi = [&[b'<'; 64][..], b"\x7f\x10\xda\xbe"].concat();
        for (bytes, expected) in [
            (&b"KDMV\x01"[..], "it is a VMDK image, and no qcow2 one: `qcow2 convert`"),
            (b"# Disk DescriptorFile\nversion=1", "it is a VMDK descriptor"),
            (b"vhdxfile", "it is a VHDX image, and no qcow2 one: `qemu-img convert`"),
            (&vdi, "it is a VDI image"),
            (b"", "it is empty"),
            (b"QF", "2 bytes are no qcow2 image; say format=raw"),
            (b"QFI\xfb\0", "it ends after 5 bytes"),
            (&[0; 512], "it is no qcow2 image; say format=raw"),
        ] {
            let told = FirstBytes(bytes.to_vec()).why_not_qcow2();
            assert!(told.starts_with(expected), "{told}");
        }
    }
}
