//! Where and as whom Clerk's Backend API is called.

use clap::Args;
use url::Url;

use super::{Secret, is_encrypted_or_local};

/// Where and as whom Clerk's Backend API is called.
#[derive(Debug, Clone, Args)]
pub struct BackendOptions {
    /// `sk_…`: changes made here are pushed to Clerk's Backend API
    #[arg(long, env = "CLERK_SECRET_KEY", hide_env_values = true)]
    pub clerk_secret_key: Option<Secret>,
    /// Another address of the Backend API
    #[arg(long, env = "CLERK_API_URL", default_value = "https://api.clerk.com")]
    pub clerk_api_url: String,
}

/// A usable address and key of the Backend API.
#[derive(Debug, Clone)]
pub struct BackendApi {
    pub secret_key: Secret,
    pub url: Url,
}

impl BackendOptions {
    /// Nothing when there is no key.
    ///
    /// # Errors
    /// A line for each fault, naming its variable and never showing the key.
    pub fn check(self) -> Result<Option<BackendApi>, Vec<String>> {
        let mut faults = Vec::new();
        let key = self.clerk_secret_key.filter(|key| !key.0.trim().is_empty());
        let plain = |key: &str| key.chars().all(|c| c.is_ascii_graphic());
        if key.as_ref().is_some_and(|key| !key.0.starts_with("sk_") || !plain(&key.0)) {
            faults.push("CLERK_SECRET_KEY: not a secret key of Clerk's (`sk_…`)".to_owned());
        }
        let url = Url::parse(&self.clerk_api_url).ok().filter(is_encrypted_or_local);
        if url.is_none() {
            let fault = "CLERK_API_URL: not an https URL (http is for this machine alone)";
            faults.push(fault.to_owned());
        }
        match url {
            Some(url) if faults.is_empty() => {
                Ok(key.map(|secret_key| BackendApi { secret_key, url }))
            }
            _ => Err(faults),
        }
    }
}
