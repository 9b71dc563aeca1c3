//! What a check found, counted and named as `qemu-img check` does.

/// So many findings are listed, and as many again that are no leaks; the others are only counted.
const LISTED: usize = 1000;

/// What kind of fault it is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Fault {
    /// The image contradicts itself: using it may lose data.
    Corruption,
    /// Clusters that nothing refers to are counted as used.
    Leak,
    /// Something could not be checked.
    Unchecked,
}

/// One fault, in words.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Finding {
    /// Its kind.
    pub fault: Fault,
    /// What and where.
    pub text: String,
}

/// The outcome of a check: the numbers of `qemu-img check --output=json`, with the same meaning.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct CheckReport {
    /// First byte of the file behind all that is in use.
    pub image_end_offset: u64,
    /// Clusters of the disk.
    pub total_clusters: u64,
    /// Clusters of the disk that have data in the image.
    pub allocated_clusters: u64,
    /// Of these, the ones that do not follow their predecessor in the file.
    pub fragmented_clusters: u64,
    /// Of these, the compressed ones.
    pub compressed_clusters: u64,
    /// Leaks that are (still) there.
    pub leaks: u64,
    /// Corruptions that are (still) there.
    pub corruptions: u64,
    /// Leaks that were repaired.
    pub leaks_fixed: u64,
    /// Corruptions that were repaired.
    pub corruptions_fixed: u64,
    /// Things that could not be checked.
    pub check_errors: u64,
    /// What was found before any repair: the first thousand, and as many again that are no leaks.
    pub findings: Vec<Finding>,
    /// Findings that are not listed.
    pub unlisted: u64,
}

impl CheckReport {
    /// Whether nothing is wrong (any more).
    pub fn is_clean(&self) -> bool {
        self.leaks == 0 && self.corruptions == 0 && self.check_errors == 0
    }

    /// The exit status that `qemu-img check` has for it: 0 clean, 1 not wholly checked,
    /// 2 corrupt, 3 leaks.
    pub fn status(&self) -> u8 {
        match self {
            _ if self.check_errors > 0 => 1,
            _ if self.corruptions > 0 => 2,
            _ if self.leaks > 0 => 3,
            _ => 0,
        }
    }

    /// Counts `n` faults of one cause. None: nothing.
    pub(super) fn found(&mut self, fault: Fault, n: u64, text: impl FnOnce() -> String) {
        if n == 0 {
            return;
        }
        let count = match fault {
            Fault::Corruption => &mut self.corruptions,
            Fault::Leak => &mut self.leaks,
            Fault::Unchecked => &mut self.check_errors,
        };
        *count = count.saturating_add(n);
        // Many leaks, as a crash may leave them, must not hide what is worse.
        let most = if fault == Fault::Leak { LISTED } else { 2 * LISTED };
        if self.findings.len() < most {
            self.findings.push(Finding { fault, text: text() });
        } else {
            self.unlisted = self.unlisted.saturating_add(1);
        }
    }

    pub(super) fn corruption(&mut self, n: u64, text: impl FnOnce() -> String) {
        self.found(Fault::Corruption, n, text);
    }
}
