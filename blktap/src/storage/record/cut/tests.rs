use std::collections::HashSet;

use super::super::Journal;
use super::*;

const EFFORT: Effort = Effort { all: 4096, sample: 8 };

fn states(cuts: &Cuts<'_>) -> HashSet<Vec<Vec<u8>>> {
    let choices = cuts.choices(EFFORT, 1);
    choices.iter().map(|c| cuts.state(c).iter().map(SparseBytes::to_vec).collect()).collect()
}

/// One byte for each sector.
fn letters(state: &HashSet<Vec<Vec<u8>>>) -> Vec<String> {
    let of = |file: &Vec<u8>| -> String {
        file.chunks(512).map(|s| char::from(if s[0] == 0 { b'.' } else { s[0] })).collect()
    };
    let mut all: Vec<_> =
        state.iter().map(|files| files.iter().map(of).collect::<Vec<_>>().join("|")).collect();
    all.sort();
    all
}

#[test]
fn each_sector_is_old_or_of_any_write_since_the_sync() {
    let journal = Journal::new(vec![SparseBytes::of(&[b'o'; 1024])]);
    let file = &journal.storages()[0];
    file.write_at(0, &[b'a'; 1024]).expect("write");
    file.write_at(512, &[b'b'; 512]).expect("write");
    let recording = journal.recording();
    let mut cuts = recording.cuts();
    assert_eq!(letters(&states(&cuts)), ["oo"]);
    assert!(cuts.step());
    assert_eq!(letters(&states(&cuts)), ["aa", "ao", "oa", "oo"]);
    assert!(cuts.step());
    assert_eq!(letters(&states(&cuts)), ["aa", "ab", "ao", "oa", "ob", "oo"]);
    assert!(!cuts.step());
}

#[test]
fn a_sync_keeps_what_came_before_it_in_its_file() {
    let journal = Journal::new(vec![SparseBytes::of(&[b'o'; 512]); 2]);
    let files = journal.storages();
    files[0].write_at(0, &[b'a'; 512]).expect("write");
    files[1].write_at(0, &[b'b'; 512]).expect("write");
    files[0].sync().expect("sync");
    files[0].write_at(0, &[b'c'; 512]).expect("write");
    let recording = journal.recording();
    let mut cuts = recording.cuts();
    let mut seen = Vec::new();
    while cuts.step() {
        seen.push(letters(&states(&cuts)).join(" "));
    }
    assert_eq!(seen, ["a|o o|o", "a|b a|o o|b o|o", "a|b a|o", "a|b a|o c|b c|o"]);
}

#[test]
fn a_file_grows_with_what_is_kept() {
    let journal = Journal::new(vec![SparseBytes::of(&[b'o'; 512])]);
    let file = &journal.storages()[0];
    file.write_at(512, &[b'a'; 1024]).expect("write");
    file.set_size(512).expect("cut");
    file.punch(0..512).expect("punch");
    let recording = journal.recording();
    let mut cuts = recording.cuts();
    cuts.step();
    assert_eq!(letters(&states(&cuts)), ["o", "o..", "o.a", "oa", "oa.", "oaa"]);
    cuts.step();
    assert_eq!(letters(&states(&cuts)), ["o", "o..", "o.a", "oa", "oa.", "oaa"]);
    cuts.step();
    assert_eq!(states(&cuts).len(), 12);
}

#[test]
fn fingerprints_tell_states_apart() {
    let journal = Journal::new(vec![SparseBytes::of(&[b'o'; 4096]), SparseBytes::default()]);
    let files = journal.storages();
    let mut random = Random(5);
    for n in 0..120u8 {
        let file = &files[usize::from(n % 2)];
        let (at, len) = (random.next() % 8000, (random.next() % 1500) as usize);
        match random.next() % 8 {
            0 => file.sync().expect("sync"),
            1 => file.punch(at..at + len as u64).expect("punch"),
            2 if n > 60 => file.set_size(at).expect("size"),
            _ => file.write_at(at, &vec![n % 7 + 1; len]).expect("write"),
        }
    }
    let recording = journal.recording();
    let mut cuts = recording.cuts();
    let (mut by_bytes, mut by_number) = (HashSet::new(), HashSet::new());
    while cuts.step() {
        for choice in cuts.choices(Effort { all: 64, sample: 8 }, 3) {
            let state = cuts.state(&choice);
            let number = cuts.fingerprint(&choice);
            assert_eq!(number, fingerprint(&state), "at {}", cuts.position());
            by_number.insert(number);
            by_bytes.insert(state.iter().map(SparseBytes::to_vec).collect::<Vec<_>>());
        }
    }
    assert!(by_bytes.len() > 500, "{}", by_bytes.len());
    assert_eq!(by_number.len(), by_bytes.len());
    let now: Vec<_> = journal.now().iter().map(SparseBytes::to_vec).collect();
    let all = cuts.choices(Effort { all: 0, sample: 0 }, 0).swap_remove(1);
    assert_eq!(cuts.state(&all).iter().map(SparseBytes::to_vec).collect::<Vec<_>>(), now);
}

#[test]
fn many_pending_writes_are_sampled() {
    let journal = Journal::new(vec![SparseBytes::of(&[b'o'; 64 << 10])]);
    let file = &journal.storages()[0];
    (0..40).for_each(|n| file.write_at(n * 1024, &[b'a'; 1024]).expect("write"));
    let recording = journal.recording();
    let mut cuts = recording.cuts();
    while cuts.step() {}
    let choices = cuts.choices(Effort { all: 1000, sample: 20 }, 9);
    assert_eq!(choices.len(), 2 + 2 * 20 + 20 + 20);
    assert_eq!(choices, cuts.choices(Effort { all: 1000, sample: 20 }, 9), "the seed decides");
    let distinct: HashSet<_> = choices.iter().map(|c| cuts.fingerprint(c)).collect();
    assert!(distinct.len() > 75, "{}", distinct.len());
}
