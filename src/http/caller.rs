//! Who may use a route. The table's class is what is enforced: [`guard`] stands before every
//! handler whose row is not public, and hands the [`Caller`] on to it.

use std::collections::BTreeSet;
use std::future::{Ready, ready};
use std::sync::Arc;

use actix_web::body::BoxBody;
use actix_web::dev::{Payload, ServiceRequest, ServiceResponse};
use actix_web::http::Method;
use actix_web::middleware::Next;
use actix_web::{Error, FromRequest, HttpMessage, HttpRequest, web};
use serde_json::json;

use super::app::App;
use super::identity;
use super::problem::{Code, Problem};
use super::rates::Class;
use super::routes::{self, Access};
use super::tus;
use crate::actors::codec::{Metadata, Source};
use crate::clerk::jwt::Verified;
use crate::clerk::translate;
use crate::domain::ids::{SessionId, UserId};
use crate::domain::user::{Onboarding, OnboardingStatus};

/// The tiers that class [`Access::Premium`] takes (CONTRACT §4).
const PREMIUM_TIERS: [&str; 2] = ["premium", "enterprise"];

/// An authenticated user in a session that is alive. As an extractor: the one whom the guard of
/// the route let through; on a public route there is none, and so 401.
#[derive(Debug, Clone)]
pub struct Caller {
    pub user_id: UserId,
    /// Absent in development mode, where nobody signs in.
    pub session_id: Option<SessionId>,
    pub role: String,
    pub permissions: BTreeSet<String>,
    pub subscription_tier: String,
    /// Absent in development mode.
    pub token: Option<Arc<Verified>>,
    pub(super) request_id: String,
}

impl Caller {
    /// What the events of this request say of their origin.
    pub fn origin(&self) -> Metadata {
        let mut origin = Metadata::by(self.user_id.as_str(), Source::Api);
        origin.correlation_id.clone_from(&self.request_id);
        origin
    }

    /// How far the caller's onboarding is: as it is known here, else as its token says.
    pub fn onboarding(&self, known: Option<Onboarding>) -> Option<Onboarding> {
        known.or_else(|| translate::onboarding(self.token.as_deref()?))
    }

    /// Holds the caller to a class; whoever is a caller is authenticated.
    ///
    /// # Errors
    /// 403, with a code and a `detail` that name what is missing.
    pub fn require(&self, access: Access) -> Result<(), Problem> {
        let is_admin = self.role == "admin";
        let missing = match access {
            Access::Public | Access::Authenticated => return Ok(()),
            Access::Premium if PREMIUM_TIERS.contains(&self.subscription_tier.as_str()) => {
                return Ok(());
            }
            Access::Admin | Access::Permission(_) if is_admin => return Ok(()),
            Access::Permission(name) if self.permissions.contains(name) => return Ok(()),
            Access::Premium => {
                let detail = json!({
                    "required_tiers": PREMIUM_TIERS,
                    "subscription_tier": self.subscription_tier,
                });
                Problem::new(Code::PremiumRequired).with_detail(detail)
            }
            // No user is one; another guard lets workers in.
            Access::Worker => Problem::new(Code::TokenInvalid),
            Access::Admin => Problem::new(Code::RoleRequired)
                .with_detail(json!({ "required_role": "admin", "role": self.role })),
            Access::Permission(name) => Problem::new(Code::PermissionRequired)
                .with_sentence(format!("The permission {name} is missing"))
                .with_detail(json!({ "required_permission": name })),
        };
        Err(missing)
    }
}

impl FromRequest for Caller {
    type Error = Problem;
    type Future = Ready<Result<Self, Problem>>;

    fn from_request(request: &HttpRequest, _: &mut Payload) -> Self::Future {
        let caller = request.extensions_mut().remove::<Caller>();
        ready(caller.ok_or_else(|| Problem::new(Code::Unauthenticated)))
    }
}

/// Stands before a handler, before its body is read: 401 and 403 come from here.
pub async fn guard(
    access: Access,
    request: ServiceRequest,
    next: Next<BoxBody>,
) -> Result<ServiceResponse<BoxBody>, Error> {
    match admit(access, request.request()).await {
        Ok(caller) => {
            request.extensions_mut().insert(caller);
            next.call(request).await
        }
        // An answer and not an error, so that what was found out on the way is still told.
        Err(problem) => Ok(request.error_response(problem)),
    }
}

async fn admit(access: Access, request: &HttpRequest) -> Result<Caller, Problem> {
    let app = request.app_data::<web::Data<App>>();
    let app = app
        .ok_or_else(|| Problem::new(Code::InternalError).caused_by("the app's data is missing"))?;
    let known = app.system.progress.now().position;
    let mut caller = identity::identify(app, request).await?;
    count(app, request, &caller)?;
    // Only now: no stranger makes the server wait. What came meanwhile may be about the caller.
    if wait_for_position(app, request).await?.is_some_and(|named| named > known) {
        caller = identity::identify(app, request).await?;
    }
    require_onboarding(app, request, &caller)?;
    caller.require(access)?;
    Ok(caller)
}

fn count(app: &App, request: &HttpRequest, caller: &Caller) -> Result<(), Problem> {
    let now = app.system.clock.now().timestamp();
    let standing = app.rates.take(caller.user_id.as_str(), class(request), now);
    request.extensions_mut().insert(standing);
    standing.into_result()
}

fn class(request: &HttpRequest) -> Class {
    match *request.method() {
        Method::GET | Method::HEAD => Class::Read,
        _ if request.path().ends_with("/signed-url") => Class::Link,
        // A piece of an upload that was counted when it began.
        _ if request.path().contains("/files/tus/") && tus::is_patch(request) => Class::Read,
        _ => Class::Write,
    }
}

/// What a user may do before its onboarding is completed.
const BEFORE_ONBOARDING: [&str; 5] =
    ["/me", "/onboarding", "/sessions", "/session-token", "/admin"];

/// Seed `marketplace-session-token`: a user who has not finished is sent to finish.
fn require_onboarding(app: &App, request: &HttpRequest, caller: &Caller) -> Result<(), Problem> {
    let open = |path: &str| BEFORE_ONBOARDING.iter().any(|open| path.starts_with(open));
    if !app.require_onboarding || routes::without_prefix(request.path()).is_some_and(open) {
        return Ok(());
    }
    let known = app.system.views.user(&caller.user_id)?.and_then(|user| user.onboarding);
    let progress = caller.onboarding(known);
    if progress.is_some_and(|progress| progress.status == OnboardingStatus::Completed) {
        return Ok(());
    }
    let detail = json!({ "redirect_path": "/onboarding" });
    Err(Problem::new(Code::OnboardingRequired).with_detail(detail))
}

/// Read-your-writes: a request that names a position, which is given, is answered from a read model
/// that has it.
///
/// # Errors
/// 400 for no position, 503 when it does not come.
pub async fn wait_for_position(app: &App, request: &HttpRequest) -> Result<Option<u64>, Problem> {
    let Some(value) = request.headers().get("x-log-position") else { return Ok(None) };
    let position = value.to_str().ok().and_then(|text| text.parse().ok()).ok_or_else(|| {
        Problem::new(Code::MalformedRequest).with_sentence("X-Log-Position is not a position")
    })?;
    app.system.visible(position).await?;
    Ok(Some(position))
}

#[cfg(test)]
mod tests {
    use actix_web::test::TestRequest;

    use super::*;

    fn caller(role: &str, tier: &str, permissions: &[&str]) -> Caller {
        Caller {
            user_id: UserId::try_from("ada".to_owned()).unwrap(),
            session_id: None,
            role: role.to_owned(),
            permissions: permissions.iter().map(|&name| name.to_owned()).collect(),
            subscription_tier: tier.to_owned(),
            token: None,
            request_id: String::new(),
        }
    }

    #[test]
    fn each_class_lets_in_whom_it_names_and_says_what_the_others_lack() {
        let premium = Access::Premium;
        let permission = Access::Permission("events:read");
        let table = [
            (caller("user", "standard", &[]), Access::Authenticated, None),
            (caller("user", "premium", &[]), premium, None),
            (caller("user", "enterprise", &[]), premium, None),
            (caller("user", "Premium", &[]), premium, Some("premium_required")),
            // An administrator has every permission; a tier is bought, not granted by the role.
            (caller("admin", "standard", &[]), premium, Some("premium_required")),
            (caller("admin", "standard", &[]), Access::Admin, None),
            (caller("creator", "enterprise", &["admin"]), Access::Admin, Some("role_required")),
            (caller("user", "standard", &["events:read"]), permission, None),
            (caller("admin", "standard", &[]), permission, None),
            (caller("user", "premium", &["events"]), permission, Some("permission_required")),
        ];
        for (caller, access, refused) in table {
            let code = caller.require(access).err().map(|problem| problem.code().name());
            assert_eq!(code, refused, "{caller:?} {access:?}");
        }
    }

    #[test]
    fn a_piece_of_an_upload_is_no_write_however_it_is_sent() {
        let (piece, whole) = ("/api/v1/files/tus/x", "/api/v1/files/tus");
        for (method, path, instead, expected) in [
            (Method::PATCH, piece, "", Class::Read),
            (Method::POST, piece, "PATCH", Class::Read),
            (Method::POST, piece, "DELETE", Class::Write),
            (Method::POST, piece, "", Class::Write),
            (Method::DELETE, piece, "PATCH", Class::Write),
            (Method::POST, whole, "PATCH", Class::Write),
            (Method::POST, "/api/v1/videos/generate", "PATCH", Class::Write),
            (Method::HEAD, piece, "", Class::Read),
            (Method::POST, "/api/v1/files/x/signed-url", "", Class::Link),
        ] {
            let request = TestRequest::default().method(method.clone()).uri(path);
            let request = request.insert_header(("x-http-method-override", instead));
            assert_eq!(class(&request.to_http_request()), expected, "{method} {path} {instead}");
        }
    }

    #[test]
    fn a_refusal_names_what_is_missing() {
        let detail = |access| {
            let problem = caller("user", "standard", &[]).require(access).unwrap_err();
            problem.body()["detail"].clone()
        };
        assert_eq!(detail(Access::Permission("x"))["required_permission"], "x");
        assert_eq!(detail(Access::Admin)["required_role"], "admin");
        assert_eq!(detail(Access::Premium)["required_tiers"], json!(["premium", "enterprise"]));
    }
}
