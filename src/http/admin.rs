//! What administrators see and decide about users.

use std::collections::BTreeMap;

use actix_web::{HttpResponse, web};
use serde_json::{Map, Value};

use super::answer;
use super::app::App;
use super::caller::Admin;
use super::jobs::at_position;
use super::json::{Fields, FromFields, Json};
use super::lists::{PageAnswer, PageQuery};
use super::problem::{Code, Problem};
use crate::domain::ids::UserId;
use crate::domain::user::{Access, Command};
use crate::views::UserRow;

/// `GET admin/users`
pub async fn users(
    app: web::Data<App>,
    _admin: Admin,
    page: PageQuery,
) -> Result<HttpResponse, Problem> {
    let found = app.system.views.users(page.cursor.as_ref(), page.limit)?;
    Ok(answer::ok(PageAnswer { items: found.items, next_cursor: found.next_cursor }))
}

/// `GET admin/users/{id}`
pub async fn user(
    app: web::Data<App>,
    _admin: Admin,
    id: web::Path<String>,
) -> Result<HttpResponse, Problem> {
    Ok(answer::ok(known(&app, &parse_id(&id)?)?))
}

/// The body of `PUT admin/users/{id}/access`; a field that is absent stays as it is.
#[derive(Debug, utoipa::ToSchema)]
pub struct AccessRequest {
    pub role: Option<String>,
    pub permissions: Option<Vec<String>>,
    pub subscription_tier: Option<String>,
}

impl FromFields for AccessRequest {
    fn from_fields(fields: &mut Fields) -> Self {
        fields.alias("subscriptionTier", "subscription_tier");
        Self {
            role: fields.optional_text("role", 1..=64),
            permissions: fields.optional_texts("permissions", 0..=256, 1..=128),
            subscription_tier: fields.optional_text("subscription_tier", 1..=64),
        }
    }
}

/// `PUT admin/users/{id}/access`
pub async fn set_access(
    app: web::Data<App>,
    admin: Admin,
    id: web::Path<String>,
    body: Json<AccessRequest>,
) -> Result<HttpResponse, Problem> {
    let user_id = parse_id(&id)?;
    let present = known(&app, &user_id)?;
    let access = Access {
        role: body.0.role.unwrap_or(present.role),
        permissions: match body.0.permissions {
            Some(permissions) => permissions.into_iter().collect(),
            None => present.permissions,
        },
        subscription_tier: body.0.subscription_tier.unwrap_or(present.subscription_tier),
    };
    change(&app, &admin, &user_id, Command::SetAccess(access)).await
}

/// The body of `PUT admin/users/{id}/feature-flags`.
#[derive(Debug, utoipa::ToSchema)]
pub struct FlagsRequest {
    /// Name to true or false; they replace the present ones.
    #[schema(value_type = Object)]
    pub feature_flags: Map<String, Value>,
}

impl FromFields for FlagsRequest {
    fn from_fields(fields: &mut Fields) -> Self {
        fields.alias("featureFlags", "feature_flags");
        let flags = fields.optional_map("feature_flags");
        if flags.as_ref().is_none_or(|flags| !flags.values().all(Value::is_boolean)) {
            fields.refuse("feature_flags", "must be an object of true and false");
        }
        Self { feature_flags: flags.unwrap_or_default() }
    }
}

/// `PUT admin/users/{id}/feature-flags`
pub async fn set_flags(
    app: web::Data<App>,
    admin: Admin,
    id: web::Path<String>,
    body: Json<FlagsRequest>,
) -> Result<HttpResponse, Problem> {
    let user_id = parse_id(&id)?;
    known(&app, &user_id)?;
    let flags = body.0.feature_flags.into_iter();
    let flags: BTreeMap<String, bool> =
        flags.map(|(name, value)| (name, value == Value::Bool(true))).collect();
    change(&app, &admin, &user_id, Command::SetFlags(flags)).await
}

async fn change(
    app: &App,
    admin: &Admin,
    user_id: &UserId,
    command: Command,
) -> Result<HttpResponse, Problem> {
    let done = app.system.users.execute(user_id, command, admin.0.origin()).await?;
    app.system.visible(done.position).await?;
    Ok(at_position(answer::ok(known(app, user_id)?), done.position))
}

fn known(app: &App, user_id: &UserId) -> Result<UserRow, Problem> {
    app.system.views.user(user_id)?.ok_or_else(|| Problem::new(Code::NotFound))
}

fn parse_id(text: &str) -> Result<UserId, Problem> {
    UserId::try_from(text.to_owned()).map_err(|_| Problem::new(Code::NotFound))
}
