{{- define "llumnix.name" -}}
{{- $name := .Release.Name -}}
{{- if not (contains "llumnix" $name) }}{{ $name = printf "%s-llumnix" $name }}{{ end -}}
{{- $name | trunc 50 | trimSuffix "-" -}}
{{- end }}

{{- define "llumnix.labels" -}}
{{ include "llumnix.selector" . }}
app.kubernetes.io/version: {{ .Chart.AppVersion | quote }}
app.kubernetes.io/managed-by: {{ .Release.Service }}
helm.sh/chart: {{ printf "%s-%s" .Chart.Name .Chart.Version }}
{{- end }}

{{- define "llumnix.selector" -}}
app.kubernetes.io/name: llumnix
app.kubernetes.io/instance: {{ .Release.Name }}
{{- end }}

{{- /* Pods that speak HTTP: all of mode pod, the head of mode ray. */}}
{{- define "llumnix.httpSelector" -}}
{{ include "llumnix.selector" . }}
{{- if eq .Values.mode "ray" }}
ray.io/node-type: head
{{- end }}
{{- end }}

{{- define "llumnix.image" -}}
{{ .Values.image.repository }}:{{ .Values.image.tag | default .Chart.AppVersion }}
{{- end }}

{{- /* Flags that the chart sets. They give way to nothing in `config`, since the manifests rely on them. */}}
{{- define "llumnix.config" -}}
{{- $v := .Values -}}
{{- $ours := dict
    "model" (required "model: name one, such as --set model=meta-llama/Llama-3.1-8B-Instruct" $v.model)
    "instances" (int $v.instances) "host" $v.host "port" (int $v.port)
    "metrics-port" (int $v.metrics.port) "metrics-host" $v.host
    "lame-duck" (int $v.shutdown.lameDuckSeconds) "shutdown-timeout" (int $v.shutdown.timeoutSeconds) -}}
{{- $parts := 1 -}}
{{- range $name, $value := $v.config -}}
{{- if has (replace "_" "-" $name) (list "pipeline-parallel-size" "prefill-context-parallel-size") }}{{ $parts = mul $parts (int $value) }}{{ end -}}
{{- end -}}
{{- if gt (int $v.gpusPerInstance) 0 -}}
{{- if or (lt $parts 1) (mod $v.gpusPerInstance (max $parts 1)) }}{{ fail (printf "gpusPerInstance: %d GPUs of an instance cannot be cut into the %d parts that config asks for" (int $v.gpusPerInstance) $parts) }}{{ end -}}
{{- $_ := set $ours "tensor-parallel-size" (div $v.gpusPerInstance $parts) -}}
{{- end -}}
{{- if $v.keys.existingSecret -}}
{{- $_ := set $ours "api-key-file" "/etc/llumnix-keys/api-keys" -}}
{{- $_ := set $ours "admin-api-key-file" "/etc/llumnix-keys/admin-api-keys" -}}
{{- if $v.keys.named }}{{ $_ := set $ours "keys" "/etc/llumnix-keys/keys.yaml" }}{{ end -}}
{{- else if not (get $v.config "insecure") -}}
{{- fail "keys.existingSecret: name a secret with the entries api-keys and admin-api-keys, or set config.insecure=true to serve everybody who reaches the pods" -}}
{{- end -}}
{{- if eq $v.mode "ray" }}{{ $_ := set $ours "ray-wait" (int $v.ray.joinSeconds) }}{{ end -}}
{{- if $v.metrics.open }}{{ $_ := set $ours "metrics-open" true }}{{ end -}}
{{- range $name, $_ := $v.config -}}
{{- $flag := $name | replace "_" "-" | replace "model-tag" "model" -}}
{{- if hasKey $ours $flag }}{{ fail (printf "config.%s: the chart sets this one, see values.yaml" $name) }}{{ end -}}
{{- if eq $flag "uds" }}{{ fail (printf "config.%s: probes and the Service need the HTTP port; leave it out" $name) }}{{ end -}}
{{- if and (eq $flag "ssl-certfile") (eq $v.mode "ray") }}{{ fail (printf "config.%s: in mode ray workers ask the head in plain HTTP; let TLS end at the ingress" $name) }}{{ end -}}
{{- end -}}
{{- toYaml (merge $ours $v.config) -}}
{{- end }}

{{- /* From the pod's end being asked for to a kill: what the flags allow for, and 20 s for the processes to end. */}}
{{- define "llumnix.grace" -}}
{{- add (int .Values.shutdown.lameDuckSeconds) (int .Values.shutdown.timeoutSeconds) 20 -}}
{{- end }}

{{- /* A port that asks in plain HTTP: with TLS at the model's port, that of the metrics. */}}
{{- define "llumnix.probedPort" -}}
{{- $port := "http" -}}
{{- range $name, $_ := .Values.config }}{{ if eq (replace "_" "-" $name) "ssl-certfile" }}{{ $port = "llumnix-metrics" }}{{ end }}{{ end -}}
{{- $port -}}
{{- end }}

{{- define "llumnix.probes" -}}
{{- $p := .Values.probes -}}
{{- $port := include "llumnix.probedPort" . -}}
startupProbe:
  httpGet: {path: /ready, port: {{ $port }}}
  periodSeconds: {{ $p.periodSeconds }}
  timeoutSeconds: {{ $p.timeoutSeconds }}
  failureThreshold: {{ $p.startupFailures }}
livenessProbe:
  httpGet: {path: /live, port: {{ $port }}}
  periodSeconds: {{ $p.periodSeconds }}
  timeoutSeconds: {{ $p.timeoutSeconds }}
  failureThreshold: {{ $p.livenessFailures }}
readinessProbe:
  httpGet: {path: /ready, port: {{ $port }}}
  periodSeconds: {{ $p.periodSeconds }}
  timeoutSeconds: {{ $p.timeoutSeconds }}
  failureThreshold: {{ $p.readinessFailures }}
{{- end }}

{{- /* Of a pod that has Ray alone: its daemon runs. KubeRay's own probes ask an agent that plain `ray` does not bring. */}}
{{- define "llumnix.workerProbes" -}}
{{- $p := .Values.probes -}}
{{- range $name, $failures := dict "startupProbe" $p.startupFailures "livenessProbe" $p.livenessFailures "readinessProbe" $p.readinessFailures }}
{{ $name }}:
  exec: {command: [/bin/bash, -c, "grep -qsx raylet /proc/[0-9]*/comm"]}
  periodSeconds: {{ $p.periodSeconds }}
  timeoutSeconds: {{ $p.timeoutSeconds }}
  failureThreshold: {{ $failures }}
{{- end }}
{{- end }}

{{- define "llumnix.env" -}}
{{- with .Values.hfToken.existingSecret }}
- name: HF_TOKEN
  valueFrom:
    secretKeyRef: {name: {{ . }}, key: {{ $.Values.hfToken.key }}}
{{- end }}
{{- with .Values.extraEnv }}
{{ toYaml . }}
{{- end }}
{{- end }}

{{- define "llumnix.podIp" -}}
- name: POD_IP
  valueFrom:
    fieldRef: {fieldPath: status.podIP}
{{- end }}

{{- define "llumnix.mounts" -}}
- {name: config, mountPath: /etc/llumnix, readOnly: true}
{{- if .Values.keys.existingSecret }}
- {name: keys, mountPath: /etc/llumnix-keys, readOnly: true}
{{- end }}
- {name: cache, mountPath: /var/cache/llumnix}
- {name: tmp, mountPath: /tmp}
- {name: shm, mountPath: /dev/shm}
{{- with .Values.extraVolumeMounts }}
{{ toYaml . }}
{{- end }}
{{- end }}

{{- /* Of a pod, but for `cache` where a claim template makes it. */}}
{{- define "llumnix.volumes" -}}
- name: config
  configMap: {name: {{ include "llumnix.name" . }}}
{{- with .Values.keys }}
{{- if .existingSecret }}
- name: keys
  secret:
    secretName: {{ .existingSecret }}
    defaultMode: 0440
    items:
      - {key: {{ .apiKeys }}, path: api-keys}
      - {key: {{ .adminApiKeys }}, path: admin-api-keys}
      {{- with .named }}
      - {key: {{ . }}, path: keys.yaml}
      {{- end }}
{{- end }}
{{- end }}
{{- if .Values.cache.existingClaim }}
- name: cache
  persistentVolumeClaim: {claimName: {{ .Values.cache.existingClaim }}}
{{- else if not (include "llumnix.claims" .) }}
- name: cache
  emptyDir: {}
{{- end }}
- name: tmp
  emptyDir: {}
- name: shm
  emptyDir: {medium: Memory, sizeLimit: {{ .Values.shm }}}
{{- with .Values.extraVolumes }}
{{ toYaml . }}
{{- end }}
{{- end }}

{{- /* Whether each pod has a claim of its own. */}}
{{- define "llumnix.claims" -}}
{{- if and (eq .Values.mode "pod") (not .Values.cache.existingClaim) (ne (toString .Values.cache.size) "0") }}yes{{ end -}}
{{- end }}

{{- /* A container's resources with that many GPUs. */}}
{{- define "llumnix.resources" -}}
{{- $r := deepCopy .root.Values.resources -}}
{{- if gt (int .gpus) 0 -}}
{{- $limits := merge (dict "nvidia.com/gpu" (int .gpus)) ($r.limits | default dict) -}}
{{- $r = merge (dict "limits" $limits) $r -}}
{{- end -}}
{{- toYaml $r -}}
{{- end }}

{{- define "llumnix.placement" -}}
{{- range $name := list "nodeSelector" "tolerations" "affinity" "topologySpreadConstraints" }}
{{- with get $.Values $name }}
{{ $name }}: {{ toYaml . | nindent 2 }}
{{- end }}
{{- end }}
{{- range $name := list "runtimeClassName" "priorityClassName" }}
{{- with get $.Values $name }}
{{ $name }}: {{ . }}
{{- end }}
{{- end }}
{{- range $n, $name := .Values.image.pullSecrets }}
{{- if eq $n 0 }}
imagePullSecrets:
{{- end }}
  - name: {{ $name }}
{{- end }}
{{- end }}

{{- /* What every pod has beside its container and its grace. */}}
{{- define "llumnix.podSpec" -}}
automountServiceAccountToken: false
enableServiceLinks: false
securityContext: {{- toYaml .Values.podSecurityContext | nindent 2 }}
{{- include "llumnix.placement" . }}
volumes: {{- include "llumnix.volumes" . | nindent 2 }}
{{- end }}
