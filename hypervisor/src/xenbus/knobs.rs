//! Knobs of a backend: one table, from which parsing, `ringback knobs` and docs/tuning.md come.

/// When a change of a knob takes effect.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Reach {
    /// When a guest connects.
    Connect,
    /// At once (`ringback set`).
    Live,
}

/// One knob of the configuration `C`.
pub struct Knob<C> {
    /// Its name, in configuration, attach and `ringback set`.
    pub name: &'static str,
    /// Its unit, empty for a choice.
    pub unit: &'static str,
    /// Its default in words.
    pub default: &'static str,
    /// Its values in words.
    pub range: &'static str,
    /// What it does.
    pub help: &'static str,
    /// The counter in which a change shows.
    pub shows_in: &'static str,
    /// When a change takes effect.
    pub reach: Reach,
    /// Sets it; none: the text is not one of its values.
    pub set: fn(&mut C, &str) -> Option<()>,
}

/// For a knob's `set`: a number from `low` to `high`.
pub fn number(value: &str, low: u32, high: u32) -> Option<u32> {
    value.parse().ok().filter(|n| (low..=high).contains(n))
}

/// For a knob's `set`: the value that was found.
pub fn put<T>(knob: &mut T, value: Option<T>) -> Option<()> {
    *knob = value?;
    Some(())
}

/// A configuration that is made of knobs.
pub trait Knobs: Sized + 'static {
    /// Every knob there is.
    const KNOBS: &'static [Knob<Self>];

    /// Sets one knob by name.
    fn set(&mut self, name: &str, value: &str) -> Result<(), String> {
        let knob = Self::KNOBS.iter().find(|k| k.name == name);
        let knob = knob.ok_or_else(|| {
            let names: Vec<&str> = Self::KNOBS.iter().map(|k| k.name).collect();
            format!("no knob is called {name}; there are: {}", names.join(", "))
        })?;
        (knob.set)(self, value)
            .ok_or_else(|| format!("{name}: {value} is not one of its values ({})", knob.range))
    }

    /// The same for a device that is connected: not for knobs that matter when it connects.
    fn set_live(&mut self, name: &str, value: &str) -> Result<(), String> {
        self.set(name, value)?;
        match Self::KNOBS.iter().find(|knob| knob.name == name).map(|knob| knob.reach) {
            Some(Reach::Connect) => {
                Err(format!("{name} takes effect when a guest connects; set it before"))
            }
            _ => Ok(()),
        }
    }

    /// Sets knobs from `name=value,name=value`, as the `options` key of a backend's node holds.
    fn set_all(&mut self, list: &str) -> Result<(), String> {
        for item in list.split(',').filter(|item| !item.is_empty()) {
            let (name, value) =
                item.split_once('=').ok_or_else(|| format!("{item}: write it as name=value"))?;
            self.set(name.trim(), value.trim())?;
        }
        Ok(())
    }

    /// The table for docs/tuning.md.
    fn markdown() -> String {
        let head = "| knob | unit | default | values | what it does | live | shows in |\n|---|---|---|---|---|---|---|\n";
        Self::KNOBS.iter().fold(head.to_owned(), |table, k| {
            let live = if k.reach == Reach::Live { "yes" } else { "" };
            let row = [k.name, k.unit, k.default, k.range, k.help, live, k.shows_in].join(" | ");
            format!("{table}| {row} |\n")
        })
    }
}
