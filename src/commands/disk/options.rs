//! `-o KEY=VALUE,...`, as qemu-img takes it.

use std::collections::BTreeMap;

use super::{Result, Usage, sizes};

/// Options by their names; each is taken once, and none may be left.
#[derive(Debug, Default)]
pub struct Options {
    given: BTreeMap<String, String>,
    /// What was asked for, for the text of a refusal.
    known: Vec<&'static str>,
}

impl Options {
    /// Reads lists, later values over earlier ones. `,,` is a comma in a value; a key without a
    /// value is switched on.
    pub fn parse(lists: &[String]) -> Result<Options> {
        let mut given = BTreeMap::new();
        for list in lists {
            for item in items(list) {
                let (key, value) = item.split_once('=').unwrap_or((&item, "on"));
                if key.is_empty() {
                    return Err(Usage(format!("-o {list}: it must be KEY=VALUE,...")).into());
                }
                given.insert(key.to_owned(), value.to_owned());
            }
        }
        Ok(Options { given, known: Vec::new() })
    }

    /// Whether the options are to be listed.
    pub fn asks_for_help(&self) -> bool {
        self.given.contains_key("help") || self.given.contains_key("?")
    }

    /// The value of `key`.
    pub fn take(&mut self, key: &'static str) -> Option<String> {
        self.known.push(key);
        self.given.remove(key)
    }

    /// A size.
    pub fn size(&mut self, key: &'static str) -> Result<Option<u64>> {
        self.take(key).map(|text| sizes::parse(&text)).transpose()
    }

    /// A number.
    pub fn number(&mut self, key: &'static str) -> Result<Option<u64>> {
        let parse = |text: String| {
            text.parse().map_err(|_| Usage(format!("{key}={text}: it must be a number")).into())
        };
        self.take(key).map(parse).transpose()
    }

    /// `on` or `off`.
    pub fn switch(&mut self, key: &'static str) -> Result<Option<bool>> {
        let on = |text: String| match text.as_str() {
            "on" | "yes" | "true" | "y" => Ok(true),
            "off" | "no" | "false" | "n" => Ok(false),
            _ => Err(Usage(format!("{key}={text}: it must be on or off")).into()),
        };
        self.take(key).map(on).transpose()
    }

    /// One of some words.
    pub fn choice<T: Copy>(&mut self, key: &'static str, of: &[(&str, T)]) -> Result<Option<T>> {
        let Some(text) = self.take(key) else { return Ok(None) };
        match of.iter().find(|(name, _)| *name == text) {
            Some((_, value)) => Ok(Some(*value)),
            None => {
                let names: Vec<&str> = of.iter().map(|(name, _)| *name).collect();
                let names = names.join(", ");
                Err(Usage(format!("{key}={text}: it must be one of {names}")).into())
            }
        }
    }

    /// All were taken.
    pub fn finish(self, format: &str) -> Result<()> {
        let mut known = self.known;
        known.sort_unstable();
        known.dedup();
        let known = known.join(", ");
        match self.given.keys().next() {
            None => Ok(()),
            Some(key) => {
                let text = format!("-o {key}: {format} has no such option; it has {known}");
                Err(Usage(text).into())
            }
        }
    }
}

/// The items of a list: split at single commas.
fn items(list: &str) -> Vec<String> {
    let mut found = vec![String::new()];
    let mut chars = list.chars().peekable();
    while let Some(c) = chars.next() {
        match (c, found.last_mut()) {
            (',', _) if chars.peek() != Some(&',') => found.push(String::new()),
            (c, Some(last)) => {
                if c == ',' {
                    chars.next();
                }
                last.push(c);
            }
            (_, None) => {}
        }
    }
    found.retain(|item| !item.is_empty());
    found
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lists_of_options() {
        let lists = ["size=64k,backing_file=a,,b,lazy".to_owned(), "size=1M".to_owned()];
        let mut options = Options::parse(&lists).expect("a list");
        assert_eq!(options.size("size").expect("a size"), Some(1 << 20));
        assert_eq!(options.take("backing_file").as_deref(), Some("a,b"));
        assert_eq!(options.switch("lazy").expect("a switch"), Some(true));
        assert!(options.finish("raw").is_ok());
        let mut options = Options::parse(&["colour=red".into()]).expect("a list");
        assert!(options.choice("colour", &[("blue", 1)]).is_err());
        let mut options = Options::parse(&["colour=red".into()]).expect("a list");
        assert!(options.number("size").expect("none").is_none());
        let error = options.finish("raw").expect_err("not known").to_string();
        assert_eq!(error, "-o colour: raw has no such option; it has size");
    }
}
