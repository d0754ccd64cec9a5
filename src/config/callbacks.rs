//! How callers are told that their jobs have ended.

use std::time::Duration;

use clap::builder::BoolishValueParser;
use clap::{ArgAction, Args};

use super::Secret;

/// The most attempts that a callback may get, and the longest wait between two of them.
const MOST_ATTEMPTS: usize = 32;
const LONGEST_DELAY: Duration = Duration::from_secs(7 * 24 * 3600);

/// The options about callbacks.
#[derive(Debug, Clone, Args)]
pub struct CallbackOptions {
    /// `whsec_…`: signs callbacks; several, comma separated, while rotating: all of them sign
    /// [default in development: made and kept]
    #[arg(long, env = "CALLBACK_SIGNING_SECRET", hide_env_values = true)]
    pub callback_signing_secret: Option<Secret>,
    /// Callbacks may also go to private addresses and to this machine
    #[arg(long, env = "CALLBACK_ALLOW_PRIVATE", default_value = "false", action = ArgAction::Set,
          num_args = 0..=1, default_missing_value = "true", value_parser = BoolishValueParser::new())]
    pub callback_allow_private: bool,
    /// How long after the one before, or after the job's end, each attempt at a callback is made
    #[arg(long, env = "CALLBACK_RETRY_SCHEDULE", default_value = "0s,5s,5m,30m,2h,5h,10h,10h")]
    pub callback_retry_schedule: String,
}

/// Checked [`CallbackOptions`].
#[derive(Debug, Clone)]
pub struct CallbackSettings {
    /// `whsec_…`, comma separated, as they were given.
    pub signing_secrets: Option<Secret>,
    pub allow_private: bool,
    /// One for each attempt.
    pub delays: Vec<Duration>,
}

impl CallbackOptions {
    /// The settings; what is wrong is added to the faults, naming its variable.
    pub fn check(self, faults: &mut Vec<String>) -> CallbackSettings {
        let delays: Option<Vec<Duration>> = self
            .callback_retry_schedule
            .split(',')
            .map(|text| humantime::parse_duration(text.trim()).ok())
            .map(|delay| delay.filter(|delay| *delay <= LONGEST_DELAY))
            .collect();
        let delays = delays.filter(|delays| delays.len() <= MOST_ATTEMPTS);
        if delays.is_none() {
            faults.push(format!(
                "CALLBACK_RETRY_SCHEDULE: not 1 to {MOST_ATTEMPTS} times such as 5s or 10h, comma \
                 separated, of 7d at the most"
            ));
        }
        CallbackSettings {
            signing_secrets: self.callback_signing_secret.filter(|it| !it.0.trim().is_empty()),
            allow_private: self.callback_allow_private,
            delays: delays.unwrap_or_default(),
        }
    }
}
